"""A task is one file and one line of `TASKS`: a made-up one is checked, planned, estimated, trained and reported."""

import json
import re
from pathlib import Path

import pytest
import transformers
from first_letter_task import FIRST_LETTER
from huggingface_hub import ModelCard
from tiny_run import metrics_of, write_config

from apt.cli import main
from apt.runs.config import load_config
from apt.runs.estimate.dry_run import dry_run
from apt.runs.estimate.estimate import estimate
from apt.runs.tasks import TASKS

PAGE = Path(__file__).parents[2] / "docs/tasks.md"
OURS = list(TASKS)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config of the made-up task, which is listed."""
    monkeypatch.setitem(TASKS, "first_letter", FIRST_LETTER)
    return write_config(tmp_path, model={"task": "first_letter"}, evaluation={"score_steps": 50})


def test_its_settings_are_checked(config: Path) -> None:
    assert load_config(config, ["metrics=[letters_right]"]).evaluation.metrics == ["letters_right"]

    with pytest.raises(ValueError, match=r"must be one of \['letters_right'\], got 'accuracy'"):
        load_config(config, ["metrics=[accuracy]"])
    with pytest.raises(ValueError, match=r"num_labels counts classes, but model\.task is 'first_letter'"):
        load_config(config, ["num_labels=26"])


def test_it_is_planned_and_estimated_before_a_run(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(config), "--dry-run"]) == 0
    assert "event " in capsys.readouterr().out

    found = estimate(load_config(config), baseline=False)

    assert list(found.phases) == ["before pruning", "masks fall", "after the last event"]
    assert found.batch == (8, 16)
    assert found.inference_speedup > 1.0


def test_it_is_trained_exported_scored_and_reported(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(config)]) == 0
    report = capsys.readouterr().out
    run = config.parent / "run"
    metrics = metrics_of(run)

    assert metrics["metric"] == "letters_right"
    assert metrics["letters_right"] > 0.95
    assert metrics["letters_right"] == pytest.approx(metrics["letters_right_before_export"], abs=1e-3)
    assert metrics["sparsity"] >= 0.5
    assert metrics["params_before"] == dry_run(load_config(config)).params
    assert "letters_right on 48 sentences" in report
    assert ModelCard.load(run / "model/README.md").data.pipeline_tag == "token-classification"
    assert main(["eval", str(run / "model"), str(config)]) == 0
    scores = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert scores["letters_right"] == metrics["letters_right"]
    assert scores["test_words"] == metrics["test_words"]


def test_without_its_line_it_is_unknown(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(TASKS, "first_letter")
    with pytest.raises(ValueError, match=r"model\.task must be one of .*, got 'first_letter'"):
        load_config(config)


@pytest.mark.parametrize("name", OURS)
def test_a_task_names_a_head_that_transformers_has(name: str) -> None:
    assert callable(getattr(transformers, TASKS[name].head).from_pretrained)


def test_the_page_of_the_tasks_names_their_scores_in_order() -> None:
    rows = re.findall(r"^\| `(\w+)` \|.*\| ([^|]+) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    told = {name: tuple(re.findall(r"`(\w+)`", scores)) for name, scores in rows}
    assert told == {name: TASKS[name].metrics for name in OURS}
