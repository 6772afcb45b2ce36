"""Runs that a signal ends, and runs that meet in one folder: nothing is lost, and one line says how to go on."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tiny_run import metrics_of, write_config, write_grid

from apt.cli import main
from apt.process.stopping import SIGNALS
from apt.runs import lock, measure
from apt.runs.experiment import launch
from apt.training.controller import Controller

SHORT: dict[str, dict[str, Any]] = {
    "training": {"max_steps": 24, "logging_steps": 50},
    "evaluation": {"event_timing_steps": 0, "inference_repeats": 1},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a config and of a run that was left alone."""
    folder = tmp_path_factory.mktemp("whole")
    assert main(["train", str(write_config(folder, **SHORT))]) == 0
    return folder


def after_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], None]) -> None:
    """Do something within a step of every run from now on."""
    original = Controller.after_step

    def wrapped(controller: Controller) -> None:
        original(controller)
        if controller.step == step:
            act()

    monkeypatch.setattr(Controller, "after_step", wrapped)


@pytest.fixture(autouse=True)
def signals_end_a_process() -> Iterator[None]:
    """As they do by default: who runs the tests under nohup or in the background hands on that they are ignored."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def interrupt_twice() -> None:
    """End a run at once."""
    send(signal.SIGINT)
    send(signal.SIGINT)


def assert_same_run(ours: Path, theirs: Path) -> None:
    assert (ours / "metrics.json").read_bytes() == (theirs / "metrics.json").read_bytes()
    weights = [(run / "model" / "model.safetensors").read_bytes() for run in (ours, theirs)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_ends_a_run_after_its_step_with_a_checkpoint(
    number: signal.Signals,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Without save_steps, after the first event and while masks fall."""
    command = ["train", str(whole / "config.yaml"), f"output_dir={tmp_path / 'run'}"]
    handlers = [signal.getsignal(each) for each in SIGNALS]
    with monkeypatch.context() as patched:
        after_step(patched, 13, lambda: send(number))
        assert main(command) == 128 + number
    told = capsys.readouterr().err.splitlines()[-1]
    assert told == (
        "apt: stopped after step 13 of 24, of which checkpoint-13 is saved; the same command with --resume goes on"
    )
    assert [signal.getsignal(each) for each in SIGNALS] == handlers
    assert [path.name for path in (tmp_path / "run.partial/checkpoints").iterdir()] == ["checkpoint-13"]
    assert not (tmp_path / "run.partial/run.lock").exists()
    assert main([*command, "--resume"]) == 0
    assert_same_run(tmp_path / "run", whole / "run")


def test_a_second_signal_ends_it_at_once(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    after_step(monkeypatch, 5, interrupt_twice)
    command = ["train", str(whole / "config.yaml"), f"output_dir={tmp_path / 'run'}", "training.save_steps=4"]
    assert main(command) == 130
    assert [path.name for path in (tmp_path / "run.partial/checkpoints").iterdir()] == ["checkpoint-4"]


def test_a_signal_after_the_last_step_keeps_what_was_trained(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", str(whole / "config.yaml"), f"output_dir={tmp_path / 'run'}"]
    with monkeypatch.context() as patched:
        original = measure.export_model

        def stopped(*args: Any, **kwargs: Any) -> Any:
            done = original(*args, **kwargs)
            send(signal.SIGTERM)
            return done

        patched.setattr(measure, "export_model", stopped)
        assert main(command) == 143
    assert "stopped after step 24 of 24, of which checkpoint-24 is saved" in capsys.readouterr().err
    assert main([*command, "--resume"]) == 0
    assert_same_run(tmp_path / "run", whole / "run")


def test_a_run_that_was_stopped_before_its_name_is_not_begun_anew_unasked(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a kill leaves it between its last file and its name, its checkpoints gone; alone, and over another."""
    command = ["train", str(whole / "config.yaml"), f"output_dir={tmp_path / 'run'}"]
    partial = tmp_path / "run.partial"

    def stop() -> None:
        shutil.copytree(whole / "run", partial)
        (partial / ".apt-lm").touch()

    stop()
    assert main(command) == 2
    told = capsys.readouterr().err
    assert f"{partial} holds a run that is whole and was stopped before it got its name; give --resume to" in told
    assert main([*command, "--resume"]) == 0
    assert_same_run(tmp_path / "run", whole / "run")
    stop()
    assert main([*command, "--resume"]) == 0
    assert "an unfinished run would replace it; --resume --overwrite goes on with that" in capsys.readouterr().err
    assert main([*command, "--resume", "--overwrite"]) == 0
    assert_same_run(tmp_path / "run", whole / "run")
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


CHILD = """
import pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
def end(number, frame):
    time.sleep(0.5)
    (folder / "ended").touch()
    sys.exit(143)
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, end)
(folder / "began").touch()
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
@pytest.mark.parametrize("launched", [False, True], ids=["the run itself", "a launcher that does not wait"])
def test_an_experiment_hands_a_signal_on_and_ends_after_its_runs(
    number: signal.Signals,
    launched: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = [sys.executable, "-c", CHILD, str(tmp_path)]
    if launched:
        launcher = "import subprocess, sys; subprocess.Popen(sys.argv[1:]).wait()"
        line = [sys.executable, "-c", launcher, *line]
    started: list[str] = []

    def command(grid: Any, cell: Any, gpu: Any) -> list[str]:
        started.append(cell.name)
        return line

    monkeypatch.setattr(launch, "command", command)

    def stop() -> None:
        while not (tmp_path / "began").exists():
            time.sleep(0.02)
        send(number)

    threading.Thread(target=stop).start()
    assert main(["experiment", str(write_grid(tmp_path, methods=["lora"], seeds=[0, 1]))]) == 128 + number
    assert (tmp_path / "ended").exists()
    assert started[0] == "lora-seed0"
    assert not list((tmp_path / "grid").glob("lora-seed1*"))
    assert "the runs have ended; the same command goes on where they are" in capsys.readouterr().err


@pytest.mark.parametrize("more", [["training.seed=5"], ["--resume"], ["training.seed=5", "--overwrite"]], ids=str)
def test_a_second_run_in_one_folder_is_refused_in_one_line(
    more: list[str], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", str(whole / "config.yaml"), f"output_dir={tmp_path / 'run'}", "training.save_steps=4"]
    second = []
    with monkeypatch.context() as patched:
        after_step(patched, 6, lambda: second.append(main([*command, *more])))
        assert main(command) == 0
    assert second == [2]
    # The progress bar of the first is on the same line.
    refused = [line.partition("apt: error: ")[2] for line in capsys.readouterr().err.splitlines()]
    (told,) = filter(None, refused)
    assert told.startswith(f"train: process {os.getpid()} has run in {tmp_path / 'run.partial'} since ")
    assert told.endswith("; wait for it, or give another output_dir")
    assert_same_run(tmp_path / "run", whole / "run")
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
    assert not (tmp_path / "run/run.lock").exists()


def lock_of(folder: Path, **owner: Any) -> Path:
    """The lock of some process in the folder of an unfinished run."""
    (folder / "run.partial").mkdir(parents=True)
    (folder / "run.partial/.apt-lm").touch()
    path = folder / "run.partial/run.lock"
    path.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": 1.0, **owner}))
    return path


def test_the_lock_of_a_dead_process_is_taken_over(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its number may be another process's by now: ours, which began at another time."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for name, pid in (("gone", dead.pid), ("another", os.getpid())):
        lock_of(tmp_path / name, pid=pid)
        assert main(["train", str(whole / "config.yaml"), f"output_dir={tmp_path / name / 'run'}"]) == 0
        told = [line for line in capsys.readouterr().err.splitlines() if "takes its place" in line]
        assert told == [
            f"apt: process {pid}, which ran in {tmp_path / name / 'run.partial'}, is no more; this one takes its place"
        ]
        assert metrics_of(tmp_path / name / "run") == metrics_of(whole / "run")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (json.dumps({"host": "elsewhere", "pid": 7, "started": 1.0}), "process 7 of elsewhere has run in"),
        ("{}", "which is no lock of ours; remove it where no run is on"),
    ],
)
def test_a_lock_that_may_be_held_is_kept(
    content: str, words: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = lock_of(tmp_path)
    path.write_text(content)
    assert main(["train", str(whole / "config.yaml"), f"output_dir={tmp_path / 'run'}", "--overwrite"]) == 2
    assert words in capsys.readouterr().err
    assert path.read_text() == content


@pytest.mark.parametrize("system", ["Unix", "Windows"])
def test_of_many_who_find_a_dead_ones_lock_one_takes_it(system: str, tmp_path: Path) -> None:
    """Windows has no fcntl: here it is hidden from us, and temporary files go where ours can be seen."""
    path = lock_of(tmp_path, pid=2**22 + 1)
    code = (
        f"import filelock, pathlib, sys, tempfile, time; tempfile.tempdir = {str(tmp_path)!r}\n"
        f"if {system == 'Windows'}: sys.modules['fcntl'] = None\n"
        "from apt.runs.lock import locked\n"
        "with locked(pathlib.Path(sys.argv[1])):\n    print('mine', flush=True); time.sleep(2)"
    )
    line = [sys.executable, "-c", code, str(path.parent)]
    racing = [subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    ends = [process.communicate() for process in racing]
    assert sum(out == "mine\n" for out, _ in ends) == 1
    assert sum("has run in" in err for _, err in ends) == 3, ends
    assert len(list(tmp_path.glob("apt-lm-*.lock"))) == (system == "Windows")


@pytest.mark.parametrize("system", ["Unix", "Windows"])
def test_who_has_the_next_turn_at_a_lock_reads_its_owner(
    system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written lies in the file, not in a buffer, when the turn ends."""
    if system == "Windows":
        monkeypatch.setattr(lock, "fcntl", None)
    turn, read = lock._turn, []

    @contextmanager
    def watched(file: Any, path: Path) -> Iterator[None]:
        with turn(file, path):
            yield
            read.append(json.loads(path.read_text() or "{}").get("pid"))

    monkeypatch.setattr(lock, "_turn", watched)
    with lock.locked(tmp_path / "run.partial"):
        assert read == [os.getpid()]


@pytest.mark.parametrize("ending", ["partial", "replaced"])
@pytest.mark.parametrize("flag", ["", "--overwrite", "--resume"])
def test_what_is_not_ours_is_refused_by_name(
    ending: str, flag: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chapter = tmp_path / f"thesis.{ending}" / "chapter1.tex"
    chapter.parent.mkdir()
    chapter.write_text("years of work")
    command = ["train", str(whole / "config.yaml"), f"output_dir={tmp_path / 'thesis'}"]
    assert main([*command, *filter(None, [flag])]) == 2
    told = capsys.readouterr().err
    assert told.splitlines()[-1] == (
        f"apt: error: {chapter.parent} is needed for what is not yet complete, but is not of apt-lm; it stays, move it "
        "away"
    )
    assert chapter.read_text() == "years of work"
    assert [path.name for path in tmp_path.iterdir()] == [chapter.parent.name]


def test_checkpoints_go_by_their_step_whatever_the_clock_says(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first was written in the future; beside them lie folders of the user."""
    checkpoints = tmp_path / "run.partial/checkpoints"

    def date() -> None:
        future = time.time() + 3600
        os.utime(checkpoints / "checkpoint-7", (future, future))
        for name in ("checkpoint-best", "checkpoint-7-mine"):
            shutil.copytree(checkpoints / "checkpoint-7", checkpoints / name)

    after_step(monkeypatch, 8, date)
    after_step(monkeypatch, 23, interrupt_twice)
    command = ["train", str(whole / "config.yaml"), f"output_dir={tmp_path / 'run'}", "training.save_steps=7"]
    assert main(command) == 130
    assert {path.name for path in checkpoints.iterdir()} == {"checkpoint-21", "checkpoint-best", "checkpoint-7-mine"}
    monkeypatch.undo()
    assert main([*command, "--resume"]) == 0
    assert_same_run(tmp_path / "run", whole / "run")
