"""What a label is: a whole number from 0 on, or a name, which counts in sorted order."""

from typing import Any

from apt.data.sources import Table


class Labels:
    """What the labels of the training data are: whole numbers from 0 on, or names, which count in sorted order."""

    def __init__(self, train: Table, column: str, num_labels: int | None) -> None:
        self.column = column
        cells = train.column(column)
        numbers = sum(_is_number(cell) for cell in cells)
        self.names: list[str] | None = train.label_names
        self.by_name = 2 * numbers < len(cells)
        if self.by_name:
            self.names = sorted({cell for cell in cells if isinstance(cell, str) and cell.strip()})
        distinct = len(self.names) if self.names else len({_whole(cell) for cell in cells} - {None})
        self.num_labels = distinct if num_labels is None else num_labels
        if num_labels is not None and self.names and len(self.names) > num_labels:
            raise ValueError(f"data: {train.source} has {len(self.names)} labels, but model.num_labels is {num_labels}")
        self.of(train)
        if self.num_labels < 2:
            raise ValueError(f"data: column {column!r} of {train.source} has one label only, {cells[0]!r}")

    def of(self, table: Table) -> list[int]:
        """The labels of a table as class numbers, or ValueError for the first row that has none."""
        return [self._class(cell, table, row) for row, cell in enumerate(table.column(self.column))]

    def _class(self, cell: Any, table: Table, row: int) -> int:
        place = f"data: {table.source}, line {table.lines[row]}, column {self.column!r}:"
        if cell is None or cell == "":
            raise ValueError(f"{place} the label is missing")
        if self.by_name:
            assert self.names is not None
            if cell not in self.names:
                raise ValueError(f"{place} label {cell!r} is not one of {', '.join(self.names[:8])}")
            return self.names.index(cell)
        number = _whole(cell)
        if number is None:
            raise ValueError(f"{place} label {cell!r} is not a whole number; classes are numbered from 0")
        if not 0 <= number < self.num_labels:
            raise ValueError(
                f"{place} label {number} is out of range; with {self.num_labels} labels they go from 0 to "
                f"{self.num_labels - 1} (model.num_labels sets how many)"
            )
        return number


def _is_number(cell: Any) -> bool:
    try:
        float(cell)
    except (TypeError, ValueError):
        return False
    return True


def _whole(cell: Any) -> int | None:
    """A label as a whole number, also from "1" and "1.0"; None where it is none."""
    return int(float(cell)) if _is_number(cell) and float(cell).is_integer() else None
