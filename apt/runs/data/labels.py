"""What a label is: a class (a whole number from 0 on, or a name, which counts in sorted order), or any number."""

import math
from typing import Any

from apt.files.reading import shown
from apt.runs.data.sources import Table


class Labels:
    """The classes that the training data has.

    Args:
        train: they are taken from here.
        column: with the labels.
        num_labels: classes; None means as many as there are distinct labels, or as the source has names for.

    Attributes: `num_labels`, and `names` by class number (None where labels are plain numbers).

    Raises:
        ValueError: a label is missing or is no class; file, line and column are named.
    """

    def __init__(self, train: Table, column: str, num_labels: int | None) -> None:
        self.column = column
        cells = train.column(column)
        self.truths = all(isinstance(cell, bool) for cell in cells)  # false is class 0, true is class 1
        self._check_kinds(train)
        self.names = train.label_names
        # Whatever most labels are, the others must be too.
        self.by_name = 2 * sum(_is_number(cell) for cell in cells) < len(cells)
        if self.by_name:
            self.names = sorted({str(cell) for cell in cells if cell is not None and cell != ""})
        known = len(self.names or set(self._numbers(train)))
        if num_labels is not None and self.names and len(self.names) > num_labels:
            raise ValueError(f"data: {train.source} has {len(self.names)} labels, but model.num_labels is {num_labels}")
        if num_labels is None and known < 2:
            raise ValueError(f"data: column {column!r} of {train.source} has one label only, {shown(cells[0])}")
        self.num_labels = known if num_labels is None else num_labels
        self.of(train)

    def _check_kinds(self, table: Table) -> None:
        """Raise ValueError for the first label that is no text and no number; a column of truths is one of numbers."""
        for row, cell in enumerate(table.column(self.column)):
            if cell is not None and (not isinstance(cell, str | int | float) or isinstance(cell, bool) != self.truths):
                raise ValueError(
                    f"{_place(table, row, self.column)} label {shown(cell)} is no text and no number, as the labels of "
                    f"a column must be"
                )

    def of(self, table: Table) -> list[int]:
        """The labels of a table as class numbers, or ValueError for the first row that has none."""
        self._check_kinds(table)
        numbers = self._numbers(table)
        for row, number in enumerate(numbers):
            if not 0 <= number < self.num_labels:
                raise ValueError(
                    f"{_place(table, row, self.column)} label {shown(number)} is out of range; with {self.num_labels} "
                    f"labels they go from 0 to {self.num_labels - 1} (model.num_labels sets how many)"
                )
        return numbers

    def _numbers(self, table: Table) -> list[int]:
        numbers = []
        for row, cell in enumerate(table.column(self.column)):
            if cell is None or cell == "":
                raise ValueError(f"{_place(table, row, self.column)} the label is missing")
            if self.by_name:
                assert self.names is not None
                if str(cell) not in self.names:
                    known = ", ".join(self.names[:8])
                    raise ValueError(
                        f"{_place(table, row, self.column)} label {shown(cell)} is not one of {known}, the labels of "
                        f"the training data"
                    )
                numbers.append(self.names.index(str(cell)))
            # A csv that went through a table of floats says 1.0.
            elif _is_number(cell) and float(cell).is_integer():
                numbers.append(int(float(cell)))
            else:
                raise ValueError(
                    f"{_place(table, row, self.column)} label {shown(cell)} is not a whole number; classes are "
                    f"numbered from 0, and model.task=regression learns other numbers"
                )
        return numbers


def numbers(table: Table, column: str) -> list[float]:
    """The labels of a table as finite numbers, or ValueError for the first row that has none."""
    found = []
    for row, cell in enumerate(table.column(column)):
        if cell is None or cell == "":
            raise ValueError(f"{_place(table, row, column)} the label is missing")
        if isinstance(cell, bool) or not _is_number(cell) or not math.isfinite(float(cell)):
            raise ValueError(
                f"{_place(table, row, column)} label {shown(cell)} is no number; model.task=regression needs one"
            )
        found.append(float(cell))
    return found


def _place(table: Table, row: int, column: str) -> str:
    return f"data: {table.source}, line {table.lines[row]}, column {column!r}:"


def _is_number(cell: Any) -> bool:
    try:
        float(cell)
    except (TypeError, ValueError, OverflowError):
        return False
    return True
