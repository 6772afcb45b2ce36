"""Runs the cells of a grid as processes of their own; one that fails does not stop the others."""

import os
import queue
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import torch

from apt.files.telling import tell
from apt.files.whole import check_writable
from apt.process.stopping import Stopped, signals
from apt.runs.experiment.grid import Cell, Grid, cells, load_grid
from apt.runs.experiment.tables import collect
from apt.runs.run_folder import METRICS, other_settings

LOGS = "logs"
LAUNCH = [
    *("-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no"),  # the run's own settings say that
]


def run_experiment(path: str | Path) -> list[str]:
    """Do every run of a grid that is not finished yet, then write tables and pages of all; returns those that failed.

    A run that was stopped goes on from its last checkpoint. What each printed is in ``logs/NAME.log`` of the grid's
    folder. A signal that asks for an end is handed on to the runs that are on, no other begins, and they end first.

    Raises:
        Stopped: after such a signal.
        OSError: the folder of the grid cannot be written.
        ValueError: a setting is wrong, a finished run of the folder was made with other settings, or a GPU that the
            grid names is not there. Nothing has begun then.
    """
    grid = load_grid(Path(path))
    todo = cells(grid)
    _check(grid, todo)
    waiting = [cell for cell in todo if not (folder_of(cell) / METRICS).exists()]
    tell(f"{len(todo)} runs, {len(todo) - len(waiting)} of them finished")
    children = Children()
    with signals(children.hand_on):
        failed = _run_all(grid, waiting, children)
    if children.signal is not None:
        raise Stopped(children.signal, "the runs have ended; the same command goes on where they are")
    finished = [folder_of(cell) for cell in todo if (folder_of(cell) / METRICS).exists()]
    if finished:
        collect(Path(grid.output_dir), finished)
    return failed


def folder_of(cell: Cell) -> Path:
    """Where a run ends up."""
    return Path(cell.config.output_dir).expanduser()


def _check(grid: Grid, todo: list[Cell]) -> None:
    check_writable(Path(grid.output_dir), "experiment")
    there = torch.cuda.device_count()
    missing = [gpu for gpu in grid.gpus if not 0 <= gpu < there]
    if missing:
        raise ValueError(f"experiment: gpus names {missing[0]}, but this machine has {there}, counted from 0")
    for cell in todo:
        folder = folder_of(cell)
        if (folder / METRICS).exists() and (other := other_settings(folder, cell.config)) is not None:
            raise ValueError(
                f"experiment: {folder} holds a finished run of other settings ({other}); remove it, or give another "
                f"output_dir"
            )


class Children:
    """The runs that are on, each in a group of processes of its own: signals reach it through us alone."""

    def __init__(self) -> None:
        self.signal: int | None = None  # the first that asked for an end
        self._groups: set[int] = set()
        self._lock = threading.RLock()  # a signal may come while the main thread holds it

    def hand_on(self, number: int) -> None:
        """Send a signal to every run; from the first on, none begins."""
        with self._lock:
            self.signal = self.signal or number
            for group in self._groups:
                _send(group, number)

    def run(self, line: list[str], log: Path) -> int | None:
        """Run a command until all its processes have ended; its exit code, None where it may not begin any more."""
        with log.open("wb") as output:
            with self._lock:
                if self.signal is not None:
                    return None
                started = subprocess.Popen(
                    line, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
                )
                self._groups.add(started.pid)
            code = started.wait()
            # A launcher that a signal ended has not waited for the run.
            while self.signal is not None and _is_alive(started.pid):
                time.sleep(0.1)
            with self._lock:
                self._groups.discard(started.pid)
        return code


def _send(group: int, number: int) -> None:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return


def _is_alive(group: int) -> bool:
    """Whether a group has a process that still does something."""
    for process in psutil.process_iter(["pid", "status"]):
        try:
            if process.info["status"] != psutil.STATUS_ZOMBIE and os.getpgid(process.info["pid"]) == group:
                return True
        except ProcessLookupError:
            continue
    return False


def _run_all(grid: Grid, waiting: list[Cell], children: Children) -> list[str]:
    """Run them, as many at a time as there are places; returns the names of those that failed."""
    places: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    for gpu in grid.gpus:
        places.put(gpu)
    if not grid.gpus:
        places.put(None)
    started, done = time.perf_counter(), 0

    def run(cell: Cell) -> str | None:
        nonlocal done
        gpu = places.get()
        try:
            error = _run(grid, cell, gpu, children)
        finally:
            places.put(gpu)
        done += 1
        left = (time.perf_counter() - started) / done * (len(waiting) - done)
        if children.signal is None:
            said = "finished" if error is None else f"failed: {error}"
            tell(f"[{done}/{len(waiting)}] {cell.name} {said}; about {left / 60:.0f} min left")
        return error

    with ThreadPoolExecutor(max_workers=max(1, len(grid.gpus))) as pool:
        errors = list(pool.map(run, waiting))
    return [cell.name for cell, error in zip(waiting, errors, strict=True) if error is not None]


def _run(grid: Grid, cell: Cell, gpu: int | None, children: Children) -> str | None:
    """One run in a process of its own; its last words if it failed, or did not begin."""
    log = Path(grid.output_dir) / LOGS / f"{cell.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    code = children.run(command(grid, cell, gpu), log)
    if code == 0:
        return None
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    last = lines[-1] if lines else "it said nothing"
    told = next((line for line in reversed(lines) if line.startswith("apt: error:")), last)
    return f"{told.removeprefix('apt: error: ')} (exit status {code}; all of it in {log})"


def command(grid: Grid, cell: Cell, gpu: int | None) -> list[str]:
    """The command line of a run, on a GPU or wherever the run itself chooses."""
    launch = [] if gpu is None else [*LAUNCH, "--gpu_ids", str(gpu), "--main_process_port", str(29500 + gpu)]
    return [sys.executable, *launch, "-m", "apt", "train", os.fspath(grid.config), *cell.overrides, "--resume"]
