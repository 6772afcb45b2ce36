"""Two processes that time the same benchmark, one at a time: a file lock that goes to and fro between their runs.

`bench.against` names the lock in BENCH_TURNS; a benchmark of its own waits for nobody. The kernel frees the lock of a
process that dies, so a failure on one side never holds the other up.
"""

import fcntl
import os
import time

VARIABLE = "BENCH_TURNS"
PAUSE = 0.005  # seconds in which the other process wakes up and takes the lock


class Turns:
    """The lock, taken from the start to the end of a process except between two timed runs."""

    def __init__(self, path: str | None) -> None:
        self._file = open(path, "a", encoding="utf-8") if path else None  # noqa: SIM115  # open as long as the process
        if self._file:
            fcntl.flock(self._file, fcntl.LOCK_EX)

    def give(self) -> None:
        """Let the others work: before waiting for a child process that takes turns itself."""
        if self._file:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def change(self) -> None:
        """The other's turn, then ours again: before every timed run."""
        if self._file:
            self.give()
            time.sleep(PAUSE)
            fcntl.flock(self._file, fcntl.LOCK_EX)


TURNS = Turns(os.environ.get(VARIABLE))
