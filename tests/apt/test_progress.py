"""What takes long says so on stderr, with the time that is left, and leaves nothing behind."""

from typing import Any

import pytest
import torch
from tiny_models import tiny_batch, tiny_model

import apt.process.progress
from apt.process.progress import progress
from apt.runs.data import Examples
from apt.runs.evaluation.language import perplexity
from apt.training.clock import medians_ms
from apt.training.controller.calibration import static_scores


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apt.process.progress, "PATIENCE", 0.0)


def test_it_hands_on_every_item_and_tells_what_is_done(impatient: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress((n for n in range(3)), "counting", total=3)) == [0, 1, 2]
    told = capsys.readouterr()
    assert "counting" in told.err
    assert "0/3" in told.err
    assert told.out == ""


def test_what_is_soon_over_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress(range(3), "counting")) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def _perplexity() -> None:
    model = tiny_model("llama", torch.float32).eval()
    ids = tiny_batch("llama")["input_ids"].tolist()
    perplexity(model, Examples({"input_ids": ids, "labels": ids}))


def _calibration() -> None:
    model: Any = tiny_model("bert", torch.float32)
    static_scores(model, [tiny_batch("bert")] * 2, lambda _: {"": torch.ones(1)}, count=2)


LONG = {
    "perplexity": _perplexity,
    "calibration": _calibration,
    "timing": lambda: medians_ms({"": lambda: None}, 2, torch.device("cpu")),
}


@pytest.mark.parametrize("what", list(LONG))
def test_long_loops_tell(what: str, impatient: None, capsys: pytest.CaptureFixture[str]) -> None:
    LONG[what]()
    assert what in capsys.readouterr().err
