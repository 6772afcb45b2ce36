"""Which rows and columns of a source are read, which are held out, and which few of them are taken."""

import warnings
from collections.abc import Hashable, Iterable

import numpy as np

from apt.files.reading import shown
from apt.runs.data.config import DataConfig
from apt.runs.data.sources import Table

GLUE_COLUMNS = {
    "cola": ["sentence"],
    "sst2": ["sentence"],
    "mrpc": ["sentence1", "sentence2"],
    "qqp": ["question1", "question2"],
    "mnli": ["premise", "hypothesis"],
    "qnli": ["question", "sentence"],
    "rte": ["sentence1", "sentence2"],
    "stsb": ["sentence1", "sentence2"],
    "wnli": ["sentence1", "sentence2"],
}
PAIR_COLUMNS = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"))
TEXT_COLUMNS = ("text", "sentence", "review", "content", "document")


def split(tables: dict[str, Table], config: DataConfig) -> tuple[Table, Table]:
    """The rows to train on and those held out: the test split of the source, or `config.test_size` rows of its own."""
    train = tables["train"]
    size = config.test_size
    if "test" in tables:
        if size is not None:
            warnings.warn(f"data: {train.source} has a test split of its own; test_size is ignored", stacklevel=3)
        return train, tables["test"]
    if size is None:
        raise ValueError(f"data: {train.source} has no test split; set data.test_size to hold sentences out")
    if size >= len(train):
        raise ValueError(f"data: data.test_size {size} leaves nothing to train on; {train.source} has {len(train)}")
    order = permutation(len(train), config.split_seed)
    return train.take(sorted(order[size:])), train.take(sorted(order[:size]))


def unseen(train: Table, keys: Iterable[Hashable], held_out: Iterable[Hashable]) -> Table:
    """The rows to train on that are not held out too, or ValueError where there are none.

    Args:
        train: with one of the keys a row.
        keys: what makes two rows the same.
        held_out: keys of the rows to test on.
    """
    tested = set(held_out)
    rows = [row for row, key in enumerate(keys) if key not in tested]
    if not rows:
        raise ValueError(f"data: every row of {train.source} is held out too; nothing is left to train on")
    return train.take(rows)


def text_columns(table: Table, config: DataConfig) -> list[str]:
    """The columns with the text: those asked for, GLUE's, or the first known name."""
    if config.text_columns is not None:
        for name in config.text_columns:
            table.column(name)
        return list(config.text_columns)
    task = config.datasets.rpartition("/")[2]
    known = GLUE_COLUMNS.get(task, [])
    if known and all(name in table.columns for name in known):
        return known
    pair = next((pair for pair in PAIR_COLUMNS if all(name in table.columns for name in pair)), None)
    single = [name for name in TEXT_COLUMNS if name in table.columns]
    if pair is None and not single:
        raise ValueError(
            f"data: no text column is known in {table.source}; set data.text_columns to one or two of "
            f"{', '.join(table.columns)}"
        )
    return list(pair) if pair is not None else single[:1]


def role_columns(
    table: Table, config: DataConfig, inputs: tuple[tuple[str, ...], ...], targets: tuple[str, ...]
) -> tuple[list[str], str]:
    """The columns of what a model is given, and of what it is to say: those asked for, or the first known names.

    Args:
        table: has the columns.
        config: `text_columns` and `target_column` ask for some.
        inputs: known names of each input; the first input must be there.
        targets: known names of the target.
    """
    if config.text_columns is not None:
        names = list(config.text_columns)
    else:
        found = [next((name for name in known if name in table.columns), None) for known in inputs]
        names = [name for name in found if name is not None] if found[0] is not None else [inputs[0][0]]
    target = config.target_column or next((name for name in targets if name in table.columns), None)
    for name, setting in (*((name, "text_columns") for name in names), (target or targets[0], "target_column")):
        if name not in table.columns:
            raise ValueError(
                f"data: {table.source} has no column {name!r}; there are {', '.join(table.columns)}, and "
                f"data.{setting} says which is read"
            )
    return names, target or targets[0]


def optional_text(table: Table, column: str) -> list[str]:
    """The cells of a column in which text may be missing; it is empty there."""
    cells = ["" if cell is None else cell for cell in table.column(column)]
    for row, cell in enumerate(cells):
        if not isinstance(cell, str):
            place = f"data: {table.source}, line {table.lines[row]}, column {column!r}:"
            raise ValueError(f"{place} the text must be text, got {shown(cell)}")
    return cells


def chosen_rows(table: Table, config: DataConfig, columns: list[str]) -> Table:
    """The rows that the filter lets through, duplicates dropped where asked. Every text that is left is text."""
    rows = list(range(len(table)))
    for name, value in (config.filter or {}).items():
        cells = table.column(name)
        rows = [row for row in rows if str(cells[row]) == str(value)]
        if not rows:
            seen = ", ".join(map(repr, list(dict.fromkeys(map(str, cells)))[:5]))
            raise ValueError(f"data: no row of {table.source} has {name} = {value!r}; there are {seen}")
    texts: dict[tuple[str, ...], int] = {}
    for row in rows:
        for name in columns:
            text = table.columns[name][row]
            if not isinstance(text, str) or not text.strip():
                what = f"must be text, got {shown(text)}" if text is not None and str(text).strip() else "is missing"
                raise ValueError(f"data: {table.source}, line {table.lines[row]}, column {name!r}: the text {what}")
        texts.setdefault(tuple(table.columns[name][row] for name in columns), row)
    return table.take(list(texts.values()) if config.drop_duplicates else rows)


def permutation(size: int, seed: int) -> list[int]:
    # numpy promises that this generator's streams never change, so a split is the same everywhere and for ever.
    order: list[int] = np.random.RandomState(seed).permutation(size).tolist()
    return order


def sample(table: Table, size: int | None, seed: int) -> Table:
    return table if size is None or size >= len(table) else table.take(sorted(permutation(len(table), seed)[:size]))
