"""Which data a run reads, and how much of it."""

from dataclasses import dataclass
from typing import Any

from apt.runs.checks import check_at_least


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which sentences, which of their columns, and how many."""

    datasets: str  # on the hub (glue/sst2), a csv, tsv, jsonl, parquet or txt file, a folder of them, package:NAME/path
    text_columns: list[str] | None = None  # one, or two for sentence pairs; null: found by their names
    label_column: str = "label"  # holds the labels
    target_column: str | None = None  # with what a model is to say; null: found by its name
    filter: dict[str, Any] | None = None  # column: value; only rows with all of these values are read
    drop_duplicates: bool = False  # of a text only the first row stays
    test_size: int | None = None  # sentences, documents, at least 1; held out where the data has no test split
    split_seed: int = 0  # of that split and of max_test_samples; training.seed does not change them
    max_length: int = 128  # tokens, at least 2; longer sentences are cut
    # tokens, at least 0, that two windows of a long context share; null: a third of max_length
    doc_stride: int | None = None
    max_target_length: int = 128  # tokens, at least 2, of what is to be written; longer is cut, and never generated
    source_prefix: str = ""  # goes before each text to be summarised or translated: "summarize: " for T5
    block_length: int = 256  # tokens, at least 2; documents of plain text are packed into blocks of so many
    train_size: int | None = None  # examples to train on, at least 1, for --dry-run, which does not read them
    max_train_samples: int | None = None  # sentences, documents, at least 1; null: all
    max_test_samples: int | None = None  # sentences, documents, at least 1; null: all
    cache: str | None = "auto"  # folder for the tokens of large data; "auto": in the user's cache; null: none are kept
    group_by_length: bool = True  # batches of sentences of like length, so that less of them is padding

    def __post_init__(self) -> None:
        sizes = {
            "test_size": 1,
            "train_size": 1,
            "max_length": 2,
            "max_target_length": 2,
            "doc_stride": 0,
            "block_length": 2,
            "max_train_samples": 1,
            "max_test_samples": 1,
            "split_seed": 0,
        }
        check_at_least("data", self, sizes)
        if self.text_columns is not None and not 1 <= len(self.text_columns) <= 2:
            raise ValueError(f"config: data.text_columns must name one or two columns, got {self.text_columns}")
