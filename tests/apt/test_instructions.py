"""Instructions and responses: what is learnt of a row, in Alpaca's words and in a chat template."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_tasks import DATA, END, END_OF_TURN, rows_of, tiny_decoder, word_tokenizer

from apt.families import IGNORED
from apt.runs.config import DataConfig
from apt.runs.data import Examples, InstructionLoader
from apt.runs.evaluation.language import perplexity

SAMPLE = "instructions.jsonl"


def load(tokenizer: Any, path: Path = DATA / SAMPLE, **settings: Any) -> InstructionLoader:
    return InstructionLoader(DataConfig(datasets=str(path), **({"test_size": 4} | settings)), tokenizer)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def halves(tokenizer: Any, data: Examples) -> dict[str, str]:
    """What is given and what is learnt of each row, as text."""
    found = {}
    for row in (data[i] for i in range(len(data))):
        learnt = [target != IGNORED for target in row["labels"]]
        start = learnt.index(True)
        assert all(learnt[start:])
        assert row["labels"][start:] == row["input_ids"][start:]
        found[tokenizer.decode(row["input_ids"][:start])] = tokenizer.decode(row["input_ids"][start:])
    return found


def test_the_response_alone_is_learnt() -> None:
    tokenizer = word_tokenizer()
    data = load(tokenizer)
    assert (len(data.train), len(data.test), data.unit) == (16, 4, "responses")
    found = halves(tokenizer, data.train) | halves(tokenizer, data.test)
    assert len(found) == 20
    for row in rows_of(SAMPLE):
        given = next(prompt for prompt in found if row["instruction"] in prompt and f"\n{row['input']}\n" in prompt)
        assert given.startswith("Below is an instruction that describes a task")
        assert given.endswith("\n\n### Response:\n")
        assert ("### Input:" in given) == bool(row["input"])
        assert found[given] == row["output"] + END


def test_a_chat_template_where_there_is_one() -> None:
    tokenizer = word_tokenizer(chat=True)
    found = halves(tokenizer, load(tokenizer).train) | halves(tokenizer, load(tokenizer).test)
    given = "<|turn|>user\nGive the opposite of the word.\n\nhot<|done|>\n<|turn|>assistant\n"
    assert found[given] == "cold" + END_OF_TURN
    assert (
        found["<|turn|>user\nName the colour of snow.<|done|>\n<|turn|>assistant\n"] == "Snow is white." + END_OF_TURN
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    other = halves(tokenizer, load(tokenizer).train) | halves(tokenizer, load(tokenizer).test)
    assert other["Name the colour of snow. >"] == "Snow is white." + END  # the template opens answers otherwise


def test_long_rows_are_cut_or_left_out() -> None:
    tokenizer = word_tokenizer()
    whole = load(tokenizer, max_length=128)
    lengths = [(row["labels"].count(IGNORED), len(row["labels"])) for row in (whole.train[i] for i in range(16))]
    longest = sorted(asked for asked, _ in lengths)[8]
    with pytest.warns(UserWarning, match=r"of 16 rows of .*instructions.jsonl are left out"):
        data = load(tokenizer, max_length=longest)
    assert len(data.train) == sum(asked < longest for asked, _ in lengths)
    assert max(map(len, data.train.columns["input_ids"])) == longest
    with pytest.raises(ValueError, match=r"of no row of .*instructions.jsonl a response fits into 3 tokens; raise"):
        load(tokenizer, max_length=3)


def test_an_instruction_that_is_held_out_is_never_trained_on(tmp_path: Path) -> None:
    tokenizer = word_tokenizer()
    data = load(tokenizer, write_rows(tmp_path / "a.jsonl", rows_of(SAMPLE) * 3), max_length=128)
    assert not set(halves(tokenizer, data.train)) & set(halves(tokenizer, data.test))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"output": None}, r"line 2, column 'output': the text is missing"),
        ({"instruction": ""}, r"line 2, column 'instruction': the text is missing"),
        ({"input": 5}, r"line 2, column 'input': the text must be text, got 5"),
    ],
)
def test_broken_rows(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    rows = rows_of(SAMPLE)
    rows[1] |= change
    with pytest.raises(ValueError, match=words):
        load(word_tokenizer(), write_rows(tmp_path / "a.jsonl", rows))


def test_other_columns(tmp_path: Path) -> None:
    tokenizer = word_tokenizer()
    rows = [{"ask": row["instruction"] + row["input"], "say": row["output"]} for row in rows_of(SAMPLE)]
    path = write_rows(tmp_path / "a.jsonl", rows)
    data = load(tokenizer, path, text_columns=["ask"], target_column="say")
    assert "Snow is white." + END in {**halves(tokenizer, data.train), **halves(tokenizer, data.test)}.values()
    with pytest.raises(
        ValueError, match=r"no column 'instruction'; there are ask, say, and data.text_columns says which"
    ):
        load(tokenizer, path)
    with pytest.raises(ValueError, match=r"no column 'output'; there are ask, say, and data.target_column says which"):
        load(tokenizer, path, text_columns=["ask"])


def test_perplexity_is_that_of_the_responses() -> None:
    """The stock model's own loss, one row at a time, weighed by the tokens of each response."""
    import torch

    model, data = tiny_decoder().double(), load(word_tokenizer())
    total, count = 0.0, 0
    for i in range(len(data.test)):
        row = {name: torch.tensor([values]) for name, values in data.test[i].items()}
        size = int((row["labels"] != IGNORED).sum())
        total, count = total + model(**row).loss.item() * size, count + size
    scores = perplexity(model, data.test, 3)
    assert scores["test_tokens"] == count
    assert scores["loss"] == pytest.approx(total / count, rel=1e-6)
