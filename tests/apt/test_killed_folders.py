"""A SIGKILL before each change of a file while folders are emptied, named and removed: none is left by half."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from killable import Moment, run_child
from tiny_run import write_config
from transformers import Trainer

from apt.files.manifest import MANIFEST
from apt.files.whole import MARK, discard, mark, write_file_aside
from apt.runs import run_folder
from apt.runs.config import load_config
from apt.training.whole_checkpoints import WholeCheckpoints, checkpoints_in, name_again

FILES = ("a.bin", "b.bin", "trainer_state.json")


def fill(folder: Path, text: str = "old") -> Path:
    folder.mkdir(parents=True)
    for name in FILES:
        (folder / name).write_text(text)
    return folder


def is_filled(folder: Path) -> bool:
    """Whether all of it is there; a list of files may have come to it."""
    return {path.name for path in folder.iterdir()} - {MARK, MANIFEST} == {*FILES}


def each_kill(folder: Path, prepare: Callable[[Path], Any], act: Callable[[Path], Any]) -> list[Path]:
    """What an act leaves when it is killed before its first, its second, ... change; last of all where it was not."""
    left = []
    for number in range(1, 200):
        trial = folder / str(number)
        prepare(trial)
        end = run_child(lambda trial=trial: act(trial) or 0, folder / "log", Moment("file", number=number))
        left.append(trial)
        if end.code == 0:
            return left
        assert end.code == -9, (folder / "log").read_text()
    raise AssertionError("never done")


def whole_run(trial: Path) -> Path:
    """A run that waits for its name."""
    partial = trial / "run.partial"
    fill(partial / "model")
    fill(partial / "checkpoints" / "checkpoint-8")
    mark(partial)
    (partial / "metrics.json").write_text("{}")
    return partial


@pytest.mark.parametrize("is_named", [False, True], ids=["fresh", "onto a finished run"])
def test_a_run_that_is_started_anew_or_named_leaves_no_half_to_resume(tmp_path: Path, *, is_named: bool) -> None:
    """Whether it is whole, and what it goes on from, is asked as ``--resume`` does."""

    config = load_config(write_config(tmp_path))

    def prepare(trial: Path) -> None:
        whole_run(trial)
        if is_named:
            (fill(trial / "run/model", "finished").parent / "metrics.json").write_text("{}")

    def begin(trial: Path) -> None:
        run_folder.begin_folder(trial / "run.partial", config)

    def publish(trial: Path) -> None:
        run_folder.publish_run(trial / "run.partial", trial / "run")

    for act in (begin, publish):
        trials = each_kill(tmp_path / act.__name__, prepare, act)
        assert len(trials) > 8
        for trial in trials:
            partial, output = trial / "run.partial", trial / "run"
            if (partial / "metrics.json").exists():
                assert is_filled(partial / "model")
            assert all(is_filled(path) for path in checkpoints_in(partial / "checkpoints"))
            finished = [path for path in (output, trial / "run.replaced") if (path / "metrics.json").exists()]
            assert all(is_filled(path / "model") for path in finished[:1])
            assert bool(finished) >= is_named
            run_folder.tidy_named(output)
            if output.exists():
                assert {path.name for path in output.iterdir()} <= {"model", "metrics.json"}
                assert not (trial / "run.replaced").exists()
        assert {path.name for path in trials[-1].iterdir()} >= ({"run"} if act is publish else {"run.partial"})


@pytest.mark.parametrize("step", [8, 4], ids=["the next", "of a step that there is"])
def test_a_checkpoint_has_its_name_only_while_all_of_it_is_there(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is to stay. What the Trainer writes stands for itself here."""
    monkeypatch.setattr(Trainer, "_get_output_dir", lambda trainer, trial: trainer.args.output_dir)
    monkeypatch.setattr(
        Trainer,
        "_save_checkpoint",
        lambda trainer, *_: fill(Path(trainer._get_output_dir(None)) / f"checkpoint-{step}", "new"),
    )

    def save(trial: Path) -> None:
        trainer: Any = object.__new__(WholeCheckpoints)
        trainer.state = SimpleNamespace(global_step=step, best_model_checkpoint=None)
        trainer.args = SimpleNamespace(output_dir=str(trial), push_to_hub=False, save_total_limit=1)
        trainer._save_checkpoint(None, None)

    trials = each_kill(tmp_path, lambda trial: fill(trial / "checkpoint-4"), save)
    assert len(trials) > 8
    for trial in trials:
        name_again(trial)
        assert checkpoints_in(trial)
        assert all(is_filled(path) for path in checkpoints_in(trial))
    assert [path.name for path in trials[-1].iterdir()] == [f"checkpoint-{step}"]
    assert (trials[-1] / f"checkpoint-{step}" / "a.bin").read_text() == "new"


def test_what_a_kill_left_of_a_shared_file_goes_a_day_later(tmp_path: Path) -> None:
    """Its name is another process's, which may write on for hours; other files' are not asked."""
    ours = [tmp_path / f".tokens.{number}.apt-lm" for number in (7, 8)]
    others = tmp_path / ".more.7.apt-lm"
    for path in (*ours, others):
        path.write_text("half")
    for path in (ours[0], others):
        os.utime(path, (time.time() - 25 * 3600,) * 2)
    with write_file_aside(tmp_path / "tokens", shared=True) as partial:
        partial.write_text("whole")
    assert {path.name for path in tmp_path.iterdir()} == {"tokens", ours[1].name, others.name}


def test_a_link_is_discarded_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    elsewhere = fill(tmp_path / "elsewhere")
    (tmp_path / "checkpoints").symlink_to(elsewhere)
    discard(tmp_path / "checkpoints")
    assert {path.name for path in tmp_path.iterdir()} == {"elsewhere"}
    assert is_filled(elsewhere)
