"""One process at a time in the folder of an unfinished run: a file there tells which one, and who comes second."""

import hashlib
import json
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import psutil

from apt.files.reading import shown
from apt.files.telling import tell
from apt.files.whole import MARK, mark

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = "run.lock"
SLACK = 2.0  # seconds by which two readings of a process's start may differ


@contextmanager
def locked(partial: Path) -> Iterator[None]:
    """Hold the folder of an unfinished run; where it was not there and nothing was written, it is gone afterwards.

    The lock of a process of this machine that is no more is taken over, and a line says so.

    Raises:
        ValueError: another process holds it.
        OSError: the folder cannot be written.
    """
    path = partial / LOCK
    us = {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())}
    while not _take(path, us):
        pass
    try:
        yield
    finally:
        _release(path, us)


def _take(path: Path, us: dict[str, Any]) -> bool:
    """Write ourselves into the lock, unless somebody who lives stands there; False where it went meanwhile."""
    mark(path.parent)
    try:
        with path.open("a+", encoding="utf-8") as file, _turn(file, path):
            # Its owner may have removed it, or given the run its name, since it was opened.
            if not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return False
            _refuse_second(file, path)
            file.seek(0)
            file.truncate()
            json.dump(us, file)
            file.flush()  # within our turn: whoever has the next one must read it
            return True
    except FileNotFoundError:
        return False


@contextmanager
def _turn(file: IO[str], path: Path) -> Iterator[None]:
    """Wait until nobody else looks into the lock: two who find a dead one's at once do not both take it."""
    if fcntl is None:
        # No file of Windows can be locked and read by others, nor removed while it is open: the turn is another's.
        from filelock import FileLock

        name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()
        with FileLock(Path(tempfile.gettempdir()) / f"apt-lm-{name[:16]}.lock"):
            yield
        return
    with suppress(OSError):  # a file system without locks has the rest
        fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
    yield


def _release(path: Path, us: dict[str, Any]) -> None:
    """Remove our lock, and the folder where nothing else is in it; a run that is whole has another name by now."""
    try:
        if path.read_text(encoding="utf-8") != json.dumps(us):
            return  # somebody began the next run
        path.unlink()
        if {entry.name for entry in path.parent.iterdir()} <= {MARK}:
            (path.parent / MARK).unlink(missing_ok=True)
            path.parent.rmdir()
    except OSError:  # gone, or somebody begins there; a lock of ours that stays is that of a dead process
        return


def _refuse_second(file: IO[str], path: Path) -> None:
    file.seek(0)
    content = file.read(4096)
    if not content:
        return
    owner = _parse(content)
    if owner is None:
        raise ValueError(f"train: {path} says {shown(content)}, which is no lock of ours; remove it where no run is on")
    host, pid, started = owner
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(started))
    if host != socket.gethostname():
        raise ValueError(
            f"train: process {pid} of {host} has run in {path.parent} since {since}; wait for it, or give another "
            f"output_dir; where it is no more, remove {path}"
        )
    now = _started(pid)
    if now is not None and abs(now - started) <= SLACK:
        raise ValueError(
            f"train: process {pid} has run in {path.parent} since {since}; wait for it, or give another output_dir"
        )
    tell(f"process {pid}, which ran in {path.parent}, is no more; this one takes its place")


def _parse(content: str) -> tuple[str, int, float] | None:
    try:
        owner: Any = json.loads(content)
        return str(owner["host"]), int(owner["pid"]), float(owner["started"])
    except (ValueError, LookupError, TypeError, OverflowError):
        return None


def _started(pid: int) -> float | None:
    """When a process of this machine began, seconds since 1970; None where there is none, or one that only waits to be
    buried."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time())
    except (psutil.Error, ValueError, OverflowError):
        return None
