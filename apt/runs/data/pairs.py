"""Texts with what is to be written of them, for encoder-decoders: summaries, translations."""

from typing import Any

from apt.families import IGNORED
from apt.runs.data.cache import Columns, kept
from apt.runs.data.config import DataConfig
from apt.runs.data.examples import TOKENIZER_BATCH, Examples, Loader
from apt.runs.data.rows import chosen_rows, role_columns, sample, split, unseen
from apt.runs.data.sources import Table, read_tables

SOURCES = ("article", "document", "source", "dialogue", "text")
TARGETS = ("highlights", "summary", "target", "abstract")


class TextPairs(Examples):
    """Rows of source tokens and target tokens, with the targets as they were written, whole: `references`."""

    def __init__(self, columns: dict[str, list[Any]], references: list[str]) -> None:
        super().__init__(columns)
        self.references = references


class PairLoader(Loader):
    """Reads sources and targets. A source that is held out is never trained on.

    Args:
        config: which data; `text_columns` names the source, `target_column` the target. Null: article and highlights,
            document and summary, or names like them. `source_prefix` goes before each source. Sources are cut after
            `max_length` tokens, targets after `max_target_length`, the end of text among them.
        tokenizer: of the model.
        seed: draws the rows where `config.max_train_samples` asks for fewer than there are.

    Attributes: `train` and `test` (`TextPairs`), and `collator`, which pads sources and, with -100, targets.

    Raises:
        ValueError: a row or a column is not what it must be, or the tokenizer has no end of text.
        FileNotFoundError, ImportError: as `DatasetLoader`.
    """

    unit = "texts"
    train: TextPairs
    test: TextPairs

    def __init__(self, config: DataConfig, tokenizer: Any, seed: int = 0) -> None:
        from transformers import DataCollatorForSeq2Seq

        if tokenizer.eos_token_id is None:
            raise ValueError("data: a target needs an end-of-text token, and the tokenizer has none")
        self.config, self.tokenizer = config, tokenizer
        tables = {name: self._pairs(table) for name, table in read_tables(config.datasets).items()}
        train, test = split(tables, config)
        train = unseen(train, train.columns["source"], test.columns["source"])
        self.train = self._tokenise(sample(train, config.max_train_samples, seed))
        self.test = self._tokenise(sample(test, config.max_test_samples, config.split_seed))
        self.collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)

    def _pairs(self, table: Table) -> Table:
        names, target = role_columns(table, self.config, (SOURCES,), TARGETS)
        if len(names) > 1:
            raise ValueError(f"data: a source is read from one column; data.text_columns names {' and '.join(names)}")
        table = chosen_rows(table, self.config, [names[0], target])
        return Table(table.source, {"source": table.columns[names[0]], "target": table.columns[target]}, table.lines)

    def _tokenise(self, table: Table) -> TextPairs:
        config = self.config
        texts = [table.columns["source"], table.columns["target"]]
        lengths = {"max_length": config.max_length, "max_target_length": config.max_target_length}
        asks = {"loader": "pairs", "prefix": config.source_prefix, "end": self.tokenizer.eos_token_id, **lengths}
        tokens = kept(config, self.tokenizer, asks, texts, lambda: self._tokens(table))
        return TextPairs(tokens, table.columns["target"])

    def _tokens(self, table: Table) -> Columns:
        tokens: Columns = {}
        for start in range(0, len(table), TOKENIZER_BATCH):
            rows = slice(start, start + TOKENIZER_BATCH)
            sources = [self.config.source_prefix + text for text in table.columns["source"][rows]]
            batch = self.tokenizer(sources, truncation=True, max_length=self.config.max_length)
            targets = self.tokenizer(text_target=table.columns["target"][rows], verbose=False)["input_ids"]
            for name, values in {**batch, "labels": [self._ended(ids) for ids in targets]}.items():
                tokens.setdefault(name, []).extend(values)
        tokens.pop("token_type_ids", None)  # an encoder-decoder has none
        return tokens

    def _ended(self, ids: list[int]) -> list[int]:
        """A target that ends, within its length: a text that never ends would not be learnt to."""
        end = self.tokenizer.eos_token_id
        ids = ids[:-1] if ids[-1:] == [end] else ids
        return [*ids[: self.config.max_target_length - 1], end]
