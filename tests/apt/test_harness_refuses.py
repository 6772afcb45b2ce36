"""What `python -m apt harness` says before the library is asked for: one line each, wherever it runs."""

import json
import sys
from pathlib import Path

import pytest
from tiny_run import write_model
from tiny_text import write_llama

from apt.cli import main


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main(["harness", *map(str, arguments)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert "Traceback" not in "".join(lines)
    return lines[-1]


def test_what_is_no_decoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, tmp_path / "none", "--tasks", "paper")
    assert line == f"apt: error: harness: {tmp_path / 'none'} is no model folder; it has no config.json"
    encoder = write_model(tmp_path / "encoder")
    line = refused(capsys, encoder, "--tasks", "paper")
    assert line.endswith(f"{encoder} holds a BertModel; the tasks are for causal language models")


def test_an_unnamed_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_llama(tmp_path / "llama") / "config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in settings.items() if name != "architectures"}))
    assert "holds a model of an unnamed class" in refused(capsys, path.parent, "--tasks", "paper")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tasks", "a", "--limit", "0"), "harness: limit is 0; give 1 or more"),
        (("--tasks", "a", "--batch_size", "-1"), "harness: batch_size is -1; give 1 or more"),
        (("--tasks", "a", "--num_fewshot", "-1"), "harness: num_fewshot is -1; give 0 or more"),
        (("--tasks", "a,,b"), "harness: no task is named; give names with commas between, or 'paper'"),
        (("--tasks", "paper,a"), "harness: 'paper' stands alone: it names its tasks, and the examples of each"),
        (("--tasks", "paper", "--num_fewshot", "3"), "harness: 'paper' stands alone"),
        (("--tasks", "a", "--include", "none/tasks"), "harness: none/tasks is no folder of task files"),
        (("--tasks", "a", "--out", "none/scores.json"), "harness: none is no folder, so scores.json cannot be written"),
    ],
)
def test_settings(arguments: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(capsys, write_llama(tmp_path / "llama"), *arguments)


@pytest.mark.parametrize("name", ["lm_eval", "datasets"])
def test_a_missing_library(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [module for module in sys.modules if module.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    line = refused(capsys, write_llama(tmp_path / "llama"), "--tasks", "a", "--include", tmp_path)
    assert line.startswith("apt: error: harness: lm-evaluation-harness is missing (")
    assert line.endswith('; pip install "apt-lm[harness]"')
