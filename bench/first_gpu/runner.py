"""Run stages one after the other, each in a process of its own with its own limit; what each did is a row at once."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from bench.first_gpu.stages import Job, Stage
from bench.rows import append_row, read_rows

ROOT = Path(__file__).parents[2]
LEAST = 3.0  # seconds: a stage that would get less is not begun
MARGIN = 10.0  # seconds before its limit in which a stage begins nothing new, but ends
OK, UNMEASURED = "ok", "unmeasured"
LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1


@dataclass
class Runner:
    """One run: where its rows go, and when it has to be over."""

    folder: Path
    device: str
    run: str
    deadline: float  # of the monotonic clock
    workers: int = 12

    def run_all(self, stages: Sequence[Stage]) -> bool:
        """Every stage, with its share of the time that is left, or its floor. Returns whether all went well."""
        well = True
        for place, stage in enumerate(stages):
            shares = sum(later.seconds for later in stages[place:])
            left = self.deadline - time.monotonic()
            limit = min(left, max(stage.floor, left * stage.seconds / shares))
            status = self.run_one(stage, limit) if limit >= LEAST else self._skip(stage)
            well = well and status == OK
        return well

    def run_one(self, stage: Stage, limit: float) -> str:
        """Begin a stage, interrupt it shortly before its limit, kill what is left of it at the limit."""
        job = Job(
            folder=self.folder, device=self.device, run=self.run, workers=self.workers,
            minutes=max(limit - MARGIN, limit / 2) / 60,
        )  # fmt: skip
        started = time.monotonic()
        self._write(stage, "begun", 0.0, f"at most {limit:.0f} s: {stage.what}")
        command = stage.command(job)
        with subprocess.Popen(
            command, cwd=ROOT, env=self._environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", start_new_session=True, preexec_fn=_begin,
        ) as process:  # fmt: skip
            echo = Echo(process.stdout, self.folder / stage.output if stage.output else None)
            try:
                asked = _end(process, limit, min(stage.grace, limit / 4))
            except BaseException:
                self._write(stage, "interrupted", time.monotonic() - started, "the whole run was ended")
                raise
            finally:
                _kill_group(process)
                echo.join()
        status = _status(process.returncode, asked)
        self._write(stage, status, time.monotonic() - started, echo.last_line())
        for partial in self.folder.glob("*.partial"):  # of a process that was killed while it wrote
            partial.unlink()
        return status

    def _skip(self, stage: Stage) -> str:
        self._write(stage, UNMEASURED, 0.0, "the time was up")
        return UNMEASURED

    def _environment(self) -> dict[str, str]:
        own = {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        if self.device == "cpu":
            own["CUDA_VISIBLE_DEVICES"] = ""
        return {key: value for key, value in os.environ.items() if key not in ("OUT", "APT_BACKEND")} | own

    def _write(self, stage: Stage, status: str, seconds: float, note: str) -> None:
        row = {"run": self.run, "stage": stage.name, "status": status, "seconds": round(seconds, 1), "note": note}
        append_row(self.folder / "stages.csv", row | {"device": self.device})
        print(f"== {stage.name}: {status}, {seconds:.0f} s, {note}", flush=True)


class Echo:
    """A thread that prints what a process prints, keeps its end, and, where a file is given, writes it down."""

    def __init__(self, stream: IO[str] | None, path: Path | None) -> None:
        assert stream is not None
        self.tail: deque[str] = deque(maxlen=40)
        self._thread = threading.Thread(target=self._copy, args=(stream, path), daemon=True)
        self._thread.start()

    def _copy(self, stream: IO[str], path: Path | None) -> None:
        file = path.open("w", encoding="utf-8") if path else None
        try:
            for line in stream:
                self.tail.append(line)
                print(line, end="", flush=True)
                if file:
                    file.write(line)
                    file.flush()
        finally:
            if file:
                file.close()

    def join(self) -> None:
        """Wait for the rest; what has left the group may hold the stream open, and is not waited for."""
        self._thread.join(timeout=3.0)

    def last_line(self) -> str:
        """What is printed last says best how a process ended."""
        said = [line.strip() for line in self.tail if line.strip()]
        return said[-1][:300] if said else ""


def _end(process: subprocess.Popen[str], limit: float, grace: float) -> str:
    """Wait for the process; returns what it was asked for: nothing, to stop, or to die."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(limit - grace)
        return ""
    process.send_signal(signal.SIGINT)  # to it alone: pytest tells its workers
    with suppress(subprocess.TimeoutExpired):
        process.wait(grace)
        return "stopped"
    return "killed"


def _kill_group(process: subprocess.Popen[str]) -> None:
    """Kill what a stage has left, workers and all."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _begin() -> None:
    """A stage does not outlive the run that began it, whatever ends that; and it can be asked to stop.

    In the background and under nohup a run is begun with signals ignored, which a stage would take over.
    """
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _status(code: int, asked: str) -> str:
    if asked:
        return asked
    if code < 0:
        return f"died of {signal.Signals(-code).name}"
    return "failed" if code else OK


def table(path: Path, run: str) -> str:
    """The stages of a run as they ended; one that has no second row was never finished."""
    latest: dict[str, dict[str, Any]] = {}
    for row in read_rows(path):
        if row["run"] == run:
            latest[row["stage"]] = row
    lines = [f"{'stage':<10} {'status':<14} {'seconds':>7}  note"]
    lines += [f"{r['stage']:<10} {r['status']:<14} {r['seconds']:>7}  {r['note'][:90]}" for r in latest.values()]
    return "\n".join(lines)


def interrupted(*_: object) -> None:
    """As a handler of SIGTERM: end as by Ctrl-C, so that the stage is killed and has its row."""
    sys.exit(143)
