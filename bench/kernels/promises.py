"""What is counted and not timed of the linear op: bytes saved, peak memory, workspace, equal bits in every run."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from bench.baselines import Built, Inputs
from bench.kernels.linear import OP, LinearCase, calls_of, gradients, judge, make_inputs, ours
from bench.kernels.session import Session, implementations, split_off_never

REPEATS = 20  # runs whose bits must be equal (G16)


def saved_bytes(built: Built, inputs: Inputs) -> int:
    """Bytes that forward keeps for backward beyond its inputs and the leaves."""
    given = [getattr(inputs, name) for name in ("x", "weight", "a", "b", "gate", "mask_in", "mask_out")]
    known = {t.untyped_storage().data_ptr() for t in [*given, *built[1]] if t is not None}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = built[0]()
    # A tensor that is both saved and returned costs its reader nothing more; y itself is not counted.
    kept.pop(y.untyped_storage().data_ptr(), None)
    return sum(kept.values())


def peaks(built: Built, inputs: Inputs) -> tuple[int, int]:
    """Peak bytes of forward above what stood before, and workspace of forward with backward: peak less results."""
    gradients(built, inputs.dy)  # so that cuBLAS holds its workspace already
    found = []
    for what in ("forward", "backward"):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        results = [built[0]()] if what == "forward" else gradients(built, inputs.dy)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        kept = sum(t.numel() * t.element_size() for t in results)
        found.append(peak if what == "forward" else peak - kept)
        del results
    return found[0], found[1]


def measure_promises(case: LinearCase, session: Session) -> None:
    """One row a contestant and promise."""
    inputs = make_inputs(case, session, 0)
    for name, (build, _) in judge(case, session).items():
        built = build(inputs)
        found: list[dict[str, Any]] = []
        saved = saved_bytes(built, inputs)
        found.append({"what": "saved bytes", "value": saved, "unit": "B"})
        if session.device.type == "cuda":
            forward, workspace = peaks(built, inputs)
            found.append({"what": "peak of forward", "value": forward, "unit": "B"})
            found.append({"what": "workspace", "value": max(0, workspace - saved), "unit": "B"})
        equal = _same_bits(built, inputs)
        found.append({"what": "runs with equal bits", "value": equal, "unit": f"of {REPEATS}"})
        session.write([case.columns() | row | {"implementation": name} for row in found])


def _same_bits(built: Built, inputs: Inputs) -> int:
    first = gradients(built, inputs.dy)
    again = (gradients(built, inputs.dy) for _ in range(REPEATS - 1))
    return 1 + sum(all(torch.equal(a, b) for a, b in zip(first, other, strict=True)) for other in again)


def measure_compaction(case: LinearCase, session: Session) -> None:
    """Half of the rows kept as a view of the weight, against the dense layer (G18)."""
    kept = case.d_out // 2
    calls: dict[str, list[Any]] = {}
    for n in range(2):
        dense = make_inputs(case, session, n)
        half = replace(dense, weight=dense.weight[:kept], b=dense.b[:kept], dy=dense.dy[:, :kept].contiguous())
        for name in split_off_never(implementations(OP, dense.x)[0], kept, case.rank)[0]:
            for label, inputs in (("dense", dense), ("half", half)):
                if session.skipped(case.name, name):
                    continue
                calls.setdefault(f"{name}|{label}", []).append(calls_of("forward+backward", ours(inputs, name), inputs))
    times = session.clock.interleaved(calls)
    rows = []
    for key, taken in times.items():
        name, label = key.split("|")
        if label == "half":
            row = case.columns() | {"d_out": kept, "what": "compacted", "implementation": name} | taken.columns()
            rows.append(row | {"value": round(taken.median / times[f"{name}|dense"].median, 4), "unit": "of dense"})
    session.write(rows)
