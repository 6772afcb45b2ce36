"""What a model trains on and is tested on: token ids and labels, row by row."""

from typing import Any

from torch.utils.data import Dataset

TOKENIZER_BATCH = 1000  # texts of one call, so that a large file never lies in memory twice


class Examples(Dataset[dict[str, Any]]):
    """Rows of tokens: ``examples[i]`` is a dict of input_ids, labels and what else the tokenizer gives, unpadded."""

    def __init__(self, columns: dict[str, list[Any]]) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns["input_ids"])

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: values[index] for name, values in self.columns.items()}


class Loader:
    """The data of a run, read and tokenised.

    Attributes:
        unit: what a row is called.
        length_setting: the setting that limits the tokens of a row.
        num_labels: outputs of a new head; None where the data does not say how many.
        label_names: of the classes, by number; None where they have none.
        train: rows to train on.
        test: rows held out.
        collator: makes a batch of rows, padded.
    """

    unit: str
    length_setting = "data.max_length"
    num_labels: int | None = None
    label_names: list[str] | None = None
    train: Examples
    test: Examples
    collator: Any
