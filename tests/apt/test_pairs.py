"""Texts and what is written of them: tokens of both sides, and generation that keeps the order of the data."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_tasks import DATA, END, rows_of, tiny_encoder_decoder, word_tokenizer

from apt.families import IGNORED
from apt.runs.config import DataConfig
from apt.runs.data import PairLoader
from apt.runs.evaluation.language import generate

SAMPLE = "summaries.jsonl"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return word_tokenizer()


def load(tokenizer: Any, path: Path = DATA / SAMPLE, **settings: Any) -> PairLoader:
    return PairLoader(DataConfig(datasets=str(path), **({"test_size": 5} | settings)), tokenizer)


def test_both_sides_become_tokens(tokenizer: Any) -> None:
    data = load(tokenizer, source_prefix="summarize: ")
    assert (len(data.train), len(data.test), data.unit) == (11, 5, "texts")
    found = {
        tokenizer.decode(row["input_ids"]): tokenizer.decode(row["labels"])
        for part in (data.train, data.test)
        for row in (part[i] for i in range(len(part)))
    }
    assert found == {"summarize: " + row["article"]: row["highlights"] + END for row in rows_of(SAMPLE)}
    written = tokenizer.batch_decode(data.test.columns["labels"])
    assert written == [reference + END for reference in data.test.references]
    batch = data.collator([data.train[0], data.train[1]])
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    sizes = [len(data.train[i]["labels"]) for i in (0, 1)]
    assert batch["labels"].ne(IGNORED).sum(1).tolist() == sizes


def test_both_sides_are_cut(tokenizer: Any) -> None:
    data = load(tokenizer, max_length=9, max_target_length=4)
    assert {len(ids) for ids in data.train.columns["input_ids"]} == {9}
    assert {(len(ids), ids[-1]) for ids in data.train.columns["labels"]} == {(4, tokenizer.eos_token_id)}
    assert set(data.test.references) <= {row["highlights"] for row in rows_of(SAMPLE)}  # what is scored is whole


def test_columns_that_are_not_there(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "a.csv"
    path.write_text("de,en\nhallo,hello\nja,yes\nnein,no\n", encoding="utf-8")
    data = load(tokenizer, path, test_size=1, text_columns=["de"], target_column="en")
    assert len(data.train) == 2
    with pytest.raises(ValueError, match=r"no column 'article'; there are de, en, and data.text_columns says which"):
        load(tokenizer, path, test_size=1)
    with pytest.raises(ValueError, match=r"read from one column; data.text_columns names de and en"):
        load(tokenizer, path, test_size=1, text_columns=["de", "en"], target_column="en")


def test_a_source_that_is_held_out_is_never_trained_on(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text((DATA / SAMPLE).read_text(encoding="utf-8") * 2, encoding="utf-8")
    data = load(tokenizer, path)
    held_out = {tuple(ids) for ids in data.test.columns["input_ids"]}
    assert not held_out & {tuple(ids) for ids in data.train.columns["input_ids"]}


@pytest.mark.parametrize("num_beams", [1, 2])
def test_texts_come_in_the_order_of_the_data(tokenizer: Any, num_beams: int) -> None:
    model, data = tiny_encoder_decoder().double(), load(tokenizer)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))  # so that texts differ
    made = generate(model, data.test, data.collator, 2, 6, num_beams)
    for i in range(len(data.test)):
        ids = torch.tensor([data.test[i]["input_ids"]])
        alone = model.generate(input_ids=ids, do_sample=False, num_beams=num_beams, max_new_tokens=6)[0].tolist()
        assert made[i][: len(alone)] == alone
        assert set(made[i][len(alone) :]) <= {tokenizer.pad_token_id}
    assert len({tuple(ids) for ids in made}) > 1
