"""Sentences, mostly with labels, as tokens."""

from collections.abc import Callable, Sequence
from typing import Any

from apt.runs.data.cache import Columns, kept
from apt.runs.data.config import DataConfig
from apt.runs.data.examples import TOKENIZER_BATCH, Examples, Loader
from apt.runs.data.labels import Labels, numbers
from apt.runs.data.rows import chosen_rows, sample, split, text_columns
from apt.runs.data.sources import Table, read_tables


class DatasetLoader(Loader):
    """Reads, checks, splits and tokenises a data set.

    Args:
        config: which data, and how much of it.
        tokenizer: of the model.
        seed: draws the sentences where `config.max_train_samples` asks for fewer than there are. The split is drawn
            with `config.split_seed`, so that runs of several seeds are tested on the same sentences.
        num_labels: classes; None means as many as the training data has.
        regression: labels are numbers of any kind, and `num_labels` is 1.
        labelled: False leaves labels out; `num_labels` is None then.

    Attributes: `train` and `test` (`Examples`), `num_labels`, `label_names` (None where labels are plain numbers), and
    `collator`, which pads a batch to its longest sentence.

    Raises:
        ValueError: a row, a column or a label is not what it must be; file, line and column are named.
        FileNotFoundError: there is no such file.
        ImportError: reading needs a package that is not installed; the command that installs it is given.
    """

    unit = "sentences"

    def __init__(
        self,
        config: DataConfig,
        tokenizer: Any,
        seed: int = 0,
        *,
        num_labels: int | None = None,
        regression: bool = False,
        labelled: bool = True,
    ) -> None:
        from transformers import DataCollatorWithPadding

        self.config = config
        tables = read_tables(config.datasets)
        columns = {name: text_columns(table, config) for name, table in tables.items()}
        tables = {name: chosen_rows(table, config, columns[name]) for name, table in tables.items()}
        self.num_labels = 1 if labelled else None
        self._labels_of: Callable[[Table], Sequence[float]] | None = None
        if labelled and regression:
            self._labels_of = lambda table: numbers(table, config.label_column)
        elif labelled:
            labels = Labels(tables["train"], config.label_column, num_labels)
            self.num_labels = labels.num_labels
            self.label_names = labels.names
            self._labels_of = labels.of
        train, test = split(tables, config)
        train = sample(train, config.max_train_samples, seed)
        test = sample(test, config.max_test_samples, config.split_seed)
        self.train = self._tokenise(train, columns["train"], tokenizer)
        self.test = self._tokenise(test, columns.get("test", columns["train"]), tokenizer)
        self.collator = DataCollatorWithPadding(tokenizer)

    def _tokenise(self, table: Table, columns: list[str], tokenizer: Any) -> Examples:
        labels = {} if self._labels_of is None else {"labels": list(self._labels_of(table))}
        texts = [table.columns[name] for name in columns]

        def make() -> Columns:
            tokens: Columns = {}
            for start in range(0, len(table), TOKENIZER_BATCH):
                some = [column[start : start + TOKENIZER_BATCH] for column in texts]
                batch = tokenizer(*some, truncation=True, max_length=self.config.max_length)
                for name, values in batch.items():
                    tokens.setdefault(name, []).extend(values)
            return tokens

        asks = {"loader": "sentences", "max_length": self.config.max_length}
        return Examples({**labels, **kept(self.config, tokenizer, asks, texts, make)})


def has_labels(config: DataConfig) -> bool:
    """Whether the data has a column of labels."""
    return any(config.label_column in table.columns for table in read_tables(config.datasets).values())
