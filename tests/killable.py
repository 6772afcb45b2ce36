"""Processes that are killed from outside, and tell until then what they are at.

A child is forked from a process that has imported everything and computed nothing, and leads a process group of its
own. What it is at lies in memory that it shares with its parent, so a SIGKILL loses none of it.
"""

import mmap
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

PHASES = (
    *("start", "emptying", "training", "event", "checkpoint", "renaming"),
    *("measuring", "export", "publishing", "report"),
)
SIZE = 1 << 22
WRITES = os.O_WRONLY | os.O_RDWR
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink")


class Pen:
    """What a child is at: how many changes of files it has made, and its phases in their order."""

    def __init__(self) -> None:
        # Rows, changes of files; then a row a phase: the moment it began, its number, the changes of files before it.
        self._cells = np.frombuffer(mmap.mmap(-1, SIZE), dtype=np.float64)
        self._stack = [0]
        self.fatal = 0  # the change of a file before which the child dies; 0: none

    @property
    def rows(self) -> int:
        return int(self._cells[0])

    @property
    def changes(self) -> int:
        return int(self._cells[1])

    def at(self, row: int) -> tuple[float, str, int]:
        began, phase, changes = self._cells[2 + 3 * row : 5 + 3 * row]
        return float(began), PHASES[int(phase)], int(changes)

    def clear(self) -> None:
        self._cells[:2] = 0
        self._stack = [0]
        self._write()

    def enter(self, phase: str) -> None:
        self._stack.append(PHASES.index(phase))
        self._write()

    def leave(self) -> None:
        self._stack.pop()
        self._write()

    def _write(self) -> None:
        row = self.rows
        if row and self._stack[-1] == int(self._cells[3 * row]):
            return
        self._cells[2 + 3 * row : 5 + 3 * row] = time.monotonic(), self._stack[-1], self.changes
        self._cells[0] = row + 1

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Count the changes of files, each before it is made."""
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES and self._counts(arguments[0]):
            pass
        elif event not in CHANGES:
            return
        self._cells[1] += 1
        if self.changes == self.fatal:
            os.killpg(0, signal.SIGKILL)

    @staticmethod
    def _counts(path: Any) -> bool:
        return not isinstance(path, int) and not os.fsdecode(path).startswith("/dev/")


PEN = Pen()


def during(owner: Any, name: str, phase: str) -> None:
    """Tell a phase for as long as a function of a module, a class or a table runs."""
    table = owner if isinstance(owner, dict) else None
    original = getattr(owner, name) if table is None else table[name]

    def told(*args: Any, **kwargs: Any) -> Any:
        PEN.enter(phase)
        try:
            return original(*args, **kwargs)
        finally:
            PEN.leave()

    if table is None:
        setattr(owner, name, told)
    else:
        table[name] = told


class Span(NamedTuple):
    """A stretch of one phase."""

    phase: str
    begin: float  # seconds since the child began
    end: float
    changes: range  # the numbers of the changes of files in it


class Story(NamedTuple):
    """A life that was left alone."""

    spans: list[Span]
    seconds: float
    changes: int

    def changes_in(self, phase: str) -> list[int]:
        """The numbers of the changes of files in a phase."""
        return [number for span in self.spans if span.phase == phase for number in span.changes]


class Moment(NamedTuple):
    """When a child is killed: at a second of its life, at one of a stretch of a phase, or before a change of a file."""

    kind: str  # "clock", "phase", "file"
    phase: str = ""
    number: int = 0  # of the stretches of the phase, or of the change
    seconds: float = 0.0


def draw_moment(kind: str, story: Story, draw: random.Random) -> Moment:
    """Any second; any stretch of any phase but the first two, which are long; any change of a file in any phase."""
    if kind == "clock":
        return Moment(kind, seconds=draw.uniform(0, story.seconds))
    if kind == "file":
        phase = draw.choice(sorted({span.phase for span in story.spans if span.changes}))
        return Moment(kind, phase, draw.choice(story.changes_in(phase)))
    phase = draw.choice(sorted({span.phase for span in story.spans} - {"start", "training"}))
    stretches = [span for span in story.spans if span.phase == phase]
    number = draw.randrange(len(stretches))
    return Moment(kind, phase, number, draw.uniform(0, stretches[number].end - stretches[number].begin))


class End(NamedTuple):
    """How a child ended."""

    code: int  # of its exit, or minus the signal
    phase: str
    story: Story


def run_child(act: Callable[[], int], log: Path, moment: Moment | None = None) -> End:
    """Run something in a child, and kill its group at a moment, where it lives so long."""
    PEN.clear()
    began = time.monotonic()
    pid = os.fork()
    if not pid:
        _be_child(act, log, moment)
    os.setpgid(pid, pid)
    status = _wait(pid, moment, began)
    now = time.monotonic()
    rows = [PEN.at(row) for row in range(PEN.rows)]
    ends = [(at, changes) for at, _, changes in rows[1:]] + [(now, PEN.changes)]
    spans = [
        Span(phase, at - began, end - began, range(changes + 1, last + 1))
        for (at, phase, changes), (end, last) in zip(rows, ends, strict=True)
    ]
    return End(os.waitstatus_to_exitcode(status), rows[-1][1], Story(spans, now - began, PEN.changes))


def _be_child(act: Callable[[], int], log: Path, moment: Moment | None) -> None:
    code = 70
    try:
        if os.getpgid(0) != os.getpid():
            os.setpgid(0, 0)
        with log.open("a", encoding="utf-8") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        if moment is not None and moment.kind == "file":
            PEN.fatal = moment.number
        sys.addaudithook(PEN.hook)
        code = act()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(pid: int, moment: Moment | None, began: float) -> int:
    """Wait for the end of a child, or for its moment; its status."""
    due = None if moment is None or moment.kind != "clock" else began + moment.seconds
    seen = stretches = 0
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        while moment is not None and moment.kind == "phase" and due is None and seen < PEN.rows:
            at, phase, _ = PEN.at(seen)
            seen += 1
            if phase == moment.phase:
                stretches += 1
                due = at + moment.seconds if stretches > moment.number else None
        if due is not None and time.monotonic() >= due:
            os.killpg(pid, signal.SIGKILL)
            return os.waitpid(pid, 0)[1]
        # Stretches of a phase may be shorter than a millisecond.
        time.sleep(0.0001 if moment is not None and moment.kind == "phase" else 0.001)
