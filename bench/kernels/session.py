"""What all cases of one run share: device, clock, deadline, and the rows they write."""

import os
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apt_kernels import selection
from bench.rows import append_rows, read_rows
from bench.timing import Clock

BAD = ("wrong", "failed")  # what makes the exit status 1
LEFT_OUT = "left out"  # the status of what the design says never to run there
NEVER = (
    f"never at {selection.ONE_KERNEL_OUTPUTS} outputs or more, or above rank {selection.ONE_KERNEL_RANK}: "
    "it makes the rank-R product anew in every tile"
)


@dataclass
class Session:
    """One run of the benchmark. Rows are on disk as soon as their case is measured."""

    device: torch.device
    clock: Clock
    path: Path
    facts: dict[str, Any]  # columns of every row: device, versions, commit, run
    deadline: float  # seconds since the epoch
    resumed: bool = False
    written: Counter[str] = field(default_factory=Counter)  # rows of this process, by status
    planted: set[str] = field(default_factory=set)  # implementations spoilt on purpose, by tests

    @property
    def dtype(self) -> torch.dtype:
        """bfloat16; float32 on a CPU, where a toy case has too few numbers for its rounding errors to average out."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def rows(self) -> list[dict[str, str]]:
        """The rows of this run so far."""
        return [row for row in read_rows(self.path) if row["run"] == self.facts["run"]]

    def write(self, rows: list[dict[str, Any]]) -> None:
        append_rows(self.path, [{"status": "ok", "dtype": str(self.dtype)[6:], **row, **self.facts} for row in rows])
        for row in rows:
            if row["implementation"]:
                self.written[row.get("status", "ok")] += 1
            if row.get("status") in BAD:
                print(f"{row['status'].upper()} {row['case']}, {row['implementation']}: {row['note']}", flush=True)

    def over(self) -> bool:
        return time.time() > self.deadline

    def synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)

    def num_copies(self, bytes_each: int) -> int:
        """Enough copies of the inputs that no run finds its own in the cache: twice its size in all, at least two."""
        if self.device.type != "cuda":
            return 2
        cache = getattr(torch.cuda.get_device_properties(self.device), "L2_cache_size", 64 * 2**20)
        return min(64, max(2, -(-2 * cache // max(1, bytes_each))))

    def skipped(self, case: str, implementation: str) -> bool:
        """Whether it brought the device down before this run was resumed."""
        return self.resumed and any(
            row["case"] == case and row["implementation"] == implementation and row["status"] == "failed"
            for row in self.rows
        )

    def failed(self, case: str, implementation: str, error: Exception, **more: Any) -> None:
        """Note an exception. After one that leaves the device unusable, start anew where this one stopped."""
        text = re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")[:300]
        self.write([{"case": case, "implementation": implementation, "status": "failed", "note": text, **more}])
        try:
            self.synchronise()
        except Exception:
            sys.stdout.flush()
            own = [argument for argument in sys.argv[1:] if not argument.startswith(("--resume=", "--run="))]
            resume = f"--resume={self.facts['run']}@{self.deadline}"
            os.execv(sys.executable, [sys.executable, "-m", "bench.kernels", *own, resume])


def normal(shape: tuple[int, ...], session: Session, generator: torch.Generator, over: int = 1) -> Tensor:
    """Random normal values of variance 1 / over, in the dtype of the session."""
    drawn = torch.randn(shape, device=session.device, generator=generator)
    return (drawn / over**0.5).to(session.dtype)


def implementations(op: str, x: Tensor) -> tuple[list[str], dict[str, str]]:
    """What can run on this tensor, "torch" first, and what cannot with the reason."""
    usable, reasons = ["torch"], {}
    for name in selection.KERNELS.get(op, ()):
        try:
            selection.by_kernels(op, x, name)
        except ValueError as error:
            reasons[name] = str(error)
        else:
            usable.append(name)
    return usable, reasons


def split_off_never(names: list[str], outputs: int, rank: int) -> tuple[list[str], dict[str, str]]:
    """The implementations that are worth timing at this size, and those that never are with the reason."""
    wide = outputs >= selection.ONE_KERNEL_OUTPUTS or rank > selection.ONE_KERNEL_RANK
    never = {"one_kernel": NEVER} if wide and "one_kernel" in names else {}
    return [name for name in names if name not in never], never


def relative_error(got: Tensor, truth: Tensor) -> float:
    """``||got - truth|| / ||truth||`` with both in float64; infinite where anything is not finite."""
    if got.shape != truth.shape or not bool(torch.isfinite(got).all()):
        return float("inf")
    apart, size = (got.double() - truth).norm().item(), truth.norm().item()
    return apart / size if size else apart
