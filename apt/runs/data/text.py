"""Plain text for a language model: documents, split as wholes, packed into blocks of tokens."""

from itertools import chain
from typing import Any

import torch
from torch import Tensor

from apt.families import IGNORED
from apt.runs.data.cache import Columns, kept
from apt.runs.data.config import DataConfig
from apt.runs.data.examples import TOKENIZER_BATCH, Examples, Loader
from apt.runs.data.rows import chosen_rows, sample, split, text_columns, unseen
from apt.runs.data.sources import Table, read_tables


class TextLoader(Loader):
    """Reads documents, holds some out as wholes, and packs the tokens of each part into blocks.

    The documents of a part stand one after the other, each ended by the end-of-text token, and are cut every
    `config.block_length` tokens. What is left over in training is dropped. Held-out blocks begin with the last token of
    the one before, and the last of them is shorter: every held-out token but the first is predicted once. A text that
    is held out is never trained on, also where the data repeats it.

    Args:
        config: which data, and how much of it; samples are documents.
        tokenizer: of the model.
        seed: draws the documents where `config.max_train_samples` asks for fewer than there are.

    Attributes: `train` and `test` (`Examples` of blocks), `train_documents` and `test_documents` (how many), and
    `collator`.

    Raises:
        ValueError: a row or a column is not what it must be, the tokenizer has no end-of-text token, or the training
            documents do not fill one block.
        FileNotFoundError, ImportError: as `DatasetLoader`.
    """

    unit = "blocks"
    length_setting = "data.block_length"

    def __init__(self, config: DataConfig, tokenizer: Any, seed: int = 0) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError("data: packed text needs an end-of-text token, and the tokenizer has none")
        self.config = config
        tables = read_tables(config.datasets)
        columns = {name: _text_column(table, config) for name, table in tables.items()}
        tables = {name: chosen_rows(table, config, [columns[name]]) for name, table in tables.items()}
        train, test = split(tables, config)
        of_train = columns["train"]
        of_test = columns.get("test", of_train)
        train = unseen(train, train.columns[of_train], test.columns[of_test])
        train = sample(train, config.max_train_samples, seed)
        test = sample(test, config.max_test_samples, config.split_seed)
        self.train_documents, self.test_documents = len(train), len(test)
        self.train = self._pack(train, of_train, tokenizer)
        self.test = self._pack(test, of_test, tokenizer, held_out=True)
        self.collator = collate_blocks
        if not len(self.train):
            raise ValueError(
                f"data: the {len(train)} documents to train on fill no block of {config.block_length} tokens; lower "
                f"data.block_length"
            )

    def _pack(self, table: Table, column: str, tokenizer: Any, *, held_out: bool = False) -> Examples:
        end = tokenizer.eos_token_id
        texts = table.columns[column]

        def make() -> Columns:
            made: list[int] = []
            for start in range(0, len(table), TOKENIZER_BATCH):
                documents = tokenizer(texts[start : start + TOKENIZER_BATCH], verbose=False)["input_ids"]
                made.extend(chain.from_iterable(ids if ids[-1:] == [end] else [*ids, end] for ids in documents))
            return {"tokens": made}

        tokens = kept(self.config, tokenizer, {"loader": "text", "end": end}, [texts], make)["tokens"]
        length = self.config.block_length
        if held_out:
            blocks = [tokens[start : start + length] for start in range(0, len(tokens) - 1, length - 1)]
        else:
            blocks = [tokens[start : start + length] for start in range(0, len(tokens) - length + 1, length)]
        return Examples({"input_ids": blocks, "labels": blocks})


def collate_blocks(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Blocks as one batch of input_ids and labels ``[B, T]``; shorter ones are padded on the right and masked.

    The model shifts the labels by one itself. No mask is made where all blocks have one length.
    """
    lengths = [len(row["input_ids"]) for row in rows]
    ids = torch.zeros(len(rows), max(lengths), dtype=torch.long)
    labels = torch.full_like(ids, IGNORED)
    mask = torch.zeros_like(ids)
    for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        ids[i, :length] = torch.tensor(row["input_ids"])
        labels[i, :length] = torch.tensor(row["labels"])
        mask[i, :length] = 1
    batch = {"input_ids": ids, "labels": labels}
    return batch if min(lengths) == max(lengths) else batch | {"attention_mask": mask}


def _text_column(table: Table, config: DataConfig) -> str:
    names = text_columns(table, config)
    if len(names) > 1:
        raise ValueError(
            f"data: packed text is read from one column, but {table.source} has {' and '.join(names)}; set "
            f"data.text_columns to one of them"
        )
    return names[0]
