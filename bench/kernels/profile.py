"""What each kernel of an op takes, by torch's profiler: a row a kernel, with GB/s where its bytes are known."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from apt_kernels import _triton
from bench.kernels.group import GroupCase, call_of, make_group, together
from bench.kernels.linear import OP, LinearCase, calls_of, make_inputs, ours
from bench.kernels.passes import PassCase, make_pass, run_pass
from bench.kernels.session import Session, implementations, split_off_never
from bench.timing import Call

MOST = 24  # kernels of a case that get a row, those that take most
REPEATS = 10  # profiled calls, after the warm-up
Case = LinearCase | GroupCase | PassCase


@dataclass
class Launches:
    """What a kernel of ours did in one call of the op."""

    count: int = 0
    moved: int = 0  # bytes: every operand read or written once


def profile_case(case: Case, session: Session) -> None:
    """Rows of every implementation; one that fails leaves the others theirs."""
    for name in _names(case, session):
        if session.skipped(_name(case), name):
            continue
        try:
            call = _call(case, name, session)
            for _ in range(3):
                call()
            session.synchronise()
            with noting_launches() as ours_did:
                call()
            rows = _rows(kernel_times(call, session.device), ours_did)
        except Exception as error:
            session.failed(_name(case), name, error, what="profile", op=case.columns()["op"])
            continue
        session.write([case.columns() | {"case": _name(case), "implementation": name} | row for row in rows])


def _name(case: Case) -> str:
    return f"profile {case.name}"


def _names(case: Case, session: Session) -> list[str]:
    """Everything of ours; on a CPU the eager path, as the profiler sees no kernels of the interpreter there."""
    if session.device.type != "cuda":
        return ["torch"]
    x = torch.empty(0, device=session.device, dtype=session.dtype)
    if isinstance(case, LinearCase):
        return split_off_never(implementations(OP, x)[0], case.d_out, case.rank)[0]
    return implementations(case.columns()["op"], x)[0]


def _call(case: Case, name: str, session: Session) -> Call:
    """Forward and backward, as they are timed."""
    if isinstance(case, LinearCase):
        inputs = make_inputs(case, session, 0)
        return calls_of("forward+backward", ours(inputs, name), inputs)
    if isinstance(case, GroupCase):
        group = make_group(case, session, 0)
        return call_of(together(group, name), group)
    tensors = make_pass(case, session, 0)
    return lambda: run_pass(case, tensors, name)


def kernel_times(call: Callable[[], object], device: torch.device) -> dict[str, tuple[float, float]]:
    """Microseconds of one launch, and launches in one call, by the name of the kernel; on a CPU of torch's own ops."""
    cuda = device.type == "cuda"
    kind = DeviceType.CUDA if cuda else DeviceType.CPU
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as seen:
        for _ in range(REPEATS):
            call()
        if cuda:
            torch.cuda.synchronize()
    taken: dict[str, list[float]] = defaultdict(list)
    for event in seen.events() or ():
        if event.device_type == kind:
            taken[event.name].append(event.time_range.elapsed_us() if cuda else event.self_cpu_time_total)
    if not taken:
        raise RuntimeError("the profiler saw no kernel")
    return {name: (sum(all_us) / len(all_us), len(all_us) / REPEATS) for name, all_us in taken.items()}


@contextmanager
def noting_launches() -> Iterator[dict[str, Launches]]:
    """Yield the Triton kernels of ours launched inside, with the bytes of their operands; nothing without Triton."""
    found: dict[str, Launches] = defaultdict(Launches)
    if not _triton.INSTALLED or _triton.interpreted():
        yield found
        return
    from triton.runtime.jit import JITFunction

    launch = JITFunction.run

    def run(self: Any, *args: Any, warmup: bool, **named: Any) -> Any:
        if not warmup:
            noted = found[self.fn.__name__]
            noted.count += 1
            noted.moved += operand_bytes(args)
        return launch(self, *args, warmup=warmup, **named)

    with patch.object(JITFunction, "run", run):
        yield found


def operand_bytes(args: tuple[Any, ...]) -> int:
    """Bytes of all tensors among the arguments, those behind descriptors too."""
    tensors = [getattr(arg, "base", arg) for arg in args if not isinstance(arg, torch.Tensor)]
    tensors = [t for t in tensors if isinstance(t, torch.Tensor)] + [a for a in args if isinstance(a, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _rows(times: dict[str, tuple[float, float]], ours_did: dict[str, Launches]) -> list[dict[str, Any]]:
    """A row a kernel, the one that takes most first."""
    rows = []
    by_share = sorted(times.items(), key=lambda item: -item[1][0] * item[1][1])
    for name, (us, calls) in by_share[:MOST]:
        row: dict[str, Any] = {"what": "profile", "kernel": name[:80], "us": round(us, 2), "calls": round(calls, 2)}
        if name in ours_did and us > 0:
            noted = ours_did[name]
            row |= {"value": round(noted.moved / noted.count / us / 1e3, 1), "unit": "GB/s"}
        rows.append(row)
    return rows
