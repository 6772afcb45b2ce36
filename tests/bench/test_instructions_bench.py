"""Instructions of our own: answers are right, none is in both parts, and what is scored is the response alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_text import write_text_config

from apt.families import IGNORED
from apt.runs.config import load_config
from apt.runs.data import Examples, InstructionLoader
from apt.runs.data.text import collate_blocks
from apt.runs.models import build_tokenizer
from bench import instructions
from bench.instructions import FAMILIES, HELD_OUT_EACH, run, scores, table, write_data


def test_instructions_are_distinct_and_their_answers_right() -> None:
    train, held_out = instructions.instructions()
    assert len(held_out) == HELD_OUT_EACH * len(FAMILIES)
    prompts = [asked for asked, _ in train + held_out]
    assert len(set(prompts)) == len(prompts) > 1000
    assert instructions.instructions() == (train, held_out)
    answers = dict(train + held_out)
    for asked, response in answers.items():
        given = asked.partition(": ")[2] or asked.partition("? ")[2]
        words = given.replace(",", "").split()
        if asked.startswith("Sort"):
            assert response.split(", ") == sorted(words)
        elif asked.startswith("Reverse"):
            assert response.split(", ") == words[::-1]
        elif asked.startswith("How many"):
            assert int(response) == len(words)
        elif asked.startswith("What is the second"):
            assert response == words[1]
        elif " plus " in asked:
            assert int(response) == sum(int(word) for word in asked.rstrip("?").split() if word.isdigit())
    assert len({word for pair in instructions.OPPOSITES for word in pair.split(":")}) == 2 * len(instructions.OPPOSITES)


class Says(torch.nn.Module):
    """Puts the tokens of a table first, whatever it reads."""

    def __init__(self, said_BT: torch.Tensor) -> None:
        super().__init__()
        self.said_BT = said_BT

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        logits = torch.nn.functional.one_hot(self.said_BT[: len(input_ids)], 10).float()
        return type("Output", (), {"logits": logits})


def test_tokens_of_the_response_count_and_a_match_is_all_of_them() -> None:
    rows = Examples(
        {"input_ids": [[1, 2, 3, 4], [1, 5, 6]], "labels": [[IGNORED, IGNORED, 3, 4], [IGNORED, IGNORED, 6]]}
    )
    said = torch.tensor([[9, 3, 4, 0], [9, 7, 9, 9]])  # of the first both tokens, of the second none
    found = scores(Says(said), rows, collate_blocks, 2)
    assert found == {"token_accuracy": pytest.approx(2 / 3), "exact_match": 0.5, "test_tokens": 3}


def test_arms_learn_the_responses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"EACH": 12, "HELD_OUT_EACH": 2}.items():
        monkeypatch.setattr(instructions, name, value)
    monkeypatch.setattr(instructions, "LONGEST", 400)  # the toy tokenizer has a token a letter
    path = write_text_config(tmp_path, training={"learning_rate": "1e-2"})
    small = ["training.max_steps=3", "pruning.prune_before_tuning=true", "pruning.moment_batches=8"]
    rows = [run(path, arm, 0, small, tmp_path / arm) for arm in ("dense", "lora", "apt repaired")]
    dense, lora, ours = rows
    assert (dense["steps"], lora["steps"], ours["steps"]) == (0, 3, 3)
    assert dense["test_tokens"] == lora["test_tokens"] == ours["test_tokens"] > 14
    assert dense["sparsity"] == lora["sparsity"] == 0.0
    assert 0.3 <= ours["sparsity"] < 0.5
    assert lora["token_accuracy"] > dense["token_accuracy"]
    lines = table([{key: str(value) for key, value in row.items()} for row in rows]).splitlines()
    assert [line.split(" | ")[1] for line in lines[2:]] == ["1", "1", "1"]
    assert lines[3].endswith("| 1.000 |")


def test_labels_leave_the_prompt_out(tmp_path: Path) -> None:
    path = write_text_config(tmp_path)
    folder = write_data(tmp_path / "data")
    first = json.loads((folder / "test.jsonl").read_text(encoding="utf-8").splitlines()[0])
    chosen = ["model.task=instruction_following", f"dataset={folder}", "data.test_size=null", "data.max_length=400"]
    config = load_config(path, chosen)
    tokenizer = build_tokenizer(config)
    data = InstructionLoader(config.data, tokenizer, 0)
    learnt = [label for label in data.test[0]["labels"] if label != IGNORED]
    assert learnt == tokenizer(first["response"])["input_ids"] + [tokenizer.eos_token_id]
