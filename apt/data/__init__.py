"""Sentences with labels, from the hub, from files or from inside an installed package, as tokens."""

import warnings
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from apt.config import DataConfig
from apt.data.labels import Labels
from apt.data.sources import Table, read_tables, resolve_model

GLUE_COLUMNS = {
    "cola": ["sentence"],
    "sst2": ["sentence"],
    "mrpc": ["sentence1", "sentence2"],
    "qqp": ["question1", "question2"],
    "mnli": ["premise", "hypothesis"],
    "qnli": ["question", "sentence"],
    "rte": ["sentence1", "sentence2"],
    "wnli": ["sentence1", "sentence2"],
}
PAIR_COLUMNS = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"))
TEXT_COLUMNS = ("text", "sentence", "review", "content", "document")
TOKENIZER_BATCH = 1000  # texts of one call, so that a large file never lies in memory twice

__all__ = ["DatasetLoader", "Examples", "resolve_model"]


class Examples(Dataset[dict[str, Any]]):
    """Tokenised sentences: ``examples[i]`` is a dict of input_ids, attention_mask and labels, without padding."""

    def __init__(self, columns: dict[str, list[Any]]) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns["labels"])

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: values[index] for name, values in self.columns.items()}


class DatasetLoader:
    """Reads, checks, splits and tokenises a data set.

    Args:
        config: which data, and how much of it.
        tokenizer: of the model.
        seed: draws the sentences where `config.max_train_samples` asks for fewer than there are. The split is drawn
            with `config.split_seed`, so that runs of several seeds are tested on the same sentences.
        num_labels: classes; None means as many as the training data has.

    Attributes: `train` and `test` (`Examples`), `num_labels`, `label_names` (None where labels are plain numbers), and
    `collator`, which pads a batch to its longest sentence.

    Raises:
        ValueError: a row, a column or a label is not what it must be; file, line and column are named.
        FileNotFoundError: there is no such file.
        ImportError: reading needs a package that is not installed; the command that installs it is given.
    """

    def __init__(self, config: DataConfig, tokenizer: Any, seed: int = 0, *, num_labels: int | None = None) -> None:
        from transformers import DataCollatorWithPadding

        self.config = config
        tables = read_tables(config.datasets)
        columns = {name: _text_columns(table, config) for name, table in tables.items()}
        tables = {name: _chosen_rows(table, config, columns[name]) for name, table in tables.items()}
        labels = Labels(tables["train"], config.label_column, num_labels)
        self.num_labels, self.label_names = labels.num_labels, labels.names
        train, test = self._split(tables)
        train = _sample(train, config.max_train_samples, seed)
        test = _sample(test, config.max_test_samples, config.split_seed)
        self.train = self._tokenise(train, columns["train"], labels, tokenizer)
        self.test = self._tokenise(test, columns.get("test", columns["train"]), labels, tokenizer)
        self.collator = DataCollatorWithPadding(tokenizer)

    def _split(self, tables: dict[str, Table]) -> tuple[Table, Table]:
        train, size = tables["train"], self.config.test_size
        if "test" in tables:
            if size is not None:
                warnings.warn(f"data: {train.source} has a test split of its own; test_size is ignored", stacklevel=3)
            return train, tables["test"]
        if size is None:
            raise ValueError(f"data: {train.source} has no test split; set data.test_size to hold sentences out")
        if size >= len(train):
            raise ValueError(f"data: data.test_size {size} leaves nothing to train on; {train.source} has {len(train)}")
        order = _permutation(len(train), self.config.split_seed)
        return train.take(sorted(order[size:])), train.take(sorted(order[:size]))

    def _tokenise(self, table: Table, columns: list[str], labels: Labels, tokenizer: Any) -> Examples:
        tokens: dict[str, list[Any]] = {"labels": labels.of(table)}
        for start in range(0, len(table), TOKENIZER_BATCH):
            texts = [table.columns[name][start : start + TOKENIZER_BATCH] for name in columns]
            batch = tokenizer(*texts, truncation=True, max_length=self.config.max_length)
            for name, values in batch.items():
                tokens.setdefault(name, []).extend(values)
        return Examples(tokens)


def _text_columns(table: Table, config: DataConfig) -> list[str]:
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


def _chosen_rows(table: Table, config: DataConfig, columns: list[str]) -> Table:
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
                what = f"must be text, got {text!r:.40}" if text is not None and str(text).strip() else "is missing"
                raise ValueError(f"data: {table.source}, line {table.lines[row]}, column {name!r}: the text {what}")
        texts.setdefault(tuple(table.columns[name][row] for name in columns), row)
    return table.take(list(texts.values()) if config.drop_duplicates else rows)


def _permutation(size: int, seed: int) -> list[int]:
    # numpy promises that this generator's streams never change, so a split is the same everywhere and for ever.
    order: list[int] = np.random.RandomState(seed).permutation(size).tolist()
    return order


def _sample(table: Table, size: int | None, seed: int) -> Table:
    return table if size is None or size >= len(table) else table.take(sorted(_permutation(len(table), seed)[:size]))
