"""The ops that are one pass over a tensor: gate, column sums, activation, norm, and the kurtosis of a weight."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import apt_kernels
from apt_kernels import reference
from bench.kernels.linear import ALLOWED, FLOOR
from bench.kernels.session import Session, implementations, normal, relative_error
from bench.timing import Call

PASSES = ("gate", "gate collecting", "column_sums", "gated_activation", "masked_norm", "weight_kurtosis")
RANK = 16  # of the low-rank part in weight_kurtosis


@dataclass(frozen=True, kw_only=True)
class PassCase:
    """One op on ``[rows, width]``: tokens and features, or for the kurtosis outputs and inputs of a weight."""

    kind: str
    rows: int
    width: int

    @property
    def op(self) -> str:
        return self.kind.partition(" ")[0]

    @property
    def name(self) -> str:
        return f"{self.kind} {self.rows}x{self.width}"

    def columns(self) -> dict[str, Any]:
        return {"case": self.name, "op": self.op, "layer": self.kind, "tokens": self.rows, "d_in": self.width}


def make_pass(case: PassCase, session: Session, seed: int) -> dict[str, Tensor]:
    """Inputs by name; those that learn ask for their gradient."""
    draw = partial(normal, session=session, generator=session.generator(seed))
    T, D = case.rows, case.width
    if case.op == "weight_kurtosis":
        return {"weight": draw((T, D)), "a": draw((RANK, D)), "b": draw((T, RANK))}
    mask = 0.1 + 0.9 * torch.rand(D, device=session.device, generator=session.generator(seed + 1))
    made = {"h": draw((T, D)), "dy": draw((T, D)), "mask": mask.to(session.dtype).float()}
    if case.op == "gated_activation":
        made["u"] = draw((T, D))
    return made


def run_pass(case: PassCase, tensors: dict[str, Tensor], backend: str | None, *, learn: bool = True) -> list[Tensor]:
    """Forward and backward by an implementation, or where `backend` is None by the reference; all results."""
    ops: Any = apt_kernels if backend else reference
    named: dict[str, Any] = {"backend": backend} if backend else {}
    if case.op == "weight_kurtosis":
        return list(ops.weight_kurtosis(tensors["weight"], tensors["a"], tensors["b"], scale=0.7, **named))
    h, mask, dy = tensors["h"].detach().requires_grad_(learn), tensors["mask"], tensors["dy"]
    if case.op == "column_sums":
        return [ops.column_sums(h.detach(), **named)]
    if case.kind == "gate collecting":
        sums, count = h.new_zeros(2, h.shape[1], dtype=torch.float32), h.new_zeros((), dtype=torch.float32)
        if backend is None:
            return [h.detach() * mask, dy * mask, torch.stack([h.detach().abs().sum(0), dy.abs().sum(0)])]
        y = apt_kernels.gate(h, mask, sums=sums, count=count, **named)
        return [y.detach(), *torch.autograd.grad(y, h, dy), sums]
    leaves = [h]
    if case.op == "gate":
        y = h * mask if backend is None else apt_kernels.gate(h, mask, **named)
    elif case.op == "masked_norm":
        y = ops.masked_norm(h, mask, None, mask, eps=1e-6, kind="rms") if backend is None else apt_kernels.masked_norm(
            h, mask, None, mask=mask, eps=1e-6, kind="rms", **named
        )  # fmt: skip
    else:
        leaves.append(tensors["u"].detach().requires_grad_(learn))
        y = ops.gated_activation(h, leaves[1], mask, kind="silu", **named)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def right_passes(case: PassCase, session: Session) -> dict[str, dict[str, Any]]:
    """Implementations no further from float64 than the reference in the dtype is; the others are written down."""
    tensors = make_pass(case, session, 0)
    first = next(iter(tensors.values()))
    truth = run_pass(case, {key: tensor.double() for key, tensor in tensors.items()}, None)
    cast = {key: tensor.to(session.dtype) for key, tensor in tensors.items()}
    eager = [relative_error(e, t) for e, t in zip(run_pass(case, cast, None), truth, strict=True)]
    usable, reasons = implementations(case.op, first)
    columns, right = case.columns(), {}
    session.write([columns | {"implementation": n, "status": "unavailable", "note": why} for n, why in reasons.items()])
    for name in usable:
        if session.skipped(case.name, name):
            continue
        try:
            found = _judge(case, tensors, name, truth, eager, session)
            session.synchronise()
        except Exception as error:
            session.failed(case.name, name, error, op=case.op)
        else:
            if found["status"] == "ok":
                right[name] = found
            else:
                session.write([columns | found | {"implementation": name}])
    return right


def _judge(
    case: PassCase, tensors: dict[str, Tensor], name: str, truth: list[Tensor], eager: list[float], session: Session
) -> dict[str, Any]:
    apt_kernels.reset_calls()
    got = run_pass(case, tensors, name)
    if name in session.planted:
        got[0] = got[0] * 1.5
    mine = [relative_error(g, t) for g, t in zip(got, truth, strict=True)]
    # Sums in float32 are allowed what float32 gives, however lucky the order of eager's additions was.
    floor = max(FLOOR[session.dtype], 1e-5)
    wrong = any(m > ALLOWED * e + floor for m, e in zip(mine, eager, strict=True))
    if name not in apt_kernels.calls().get(case.op, {}):
        return {"status": "wrong", "note": f"ran {apt_kernels.calls()} instead"}
    text = "; ".join(f"{m:.2e} (eager {e:.2e})" for m, e in zip(mine, eager, strict=True))
    worst = max(range(len(mine)), key=lambda n: mine[n] / max(eager[n], 1e-30))
    errors = {"error": f"{mine[worst]:.3e}", "eager_error": f"{eager[worst]:.3e}"}
    return {"status": "wrong" if wrong else "ok", "note": text} | errors


def moved_bytes(case: PassCase, session: Session) -> int:
    """What has to be read and written at the least, forward and backward."""
    reads_and_writes = {"column_sums": 1, "weight_kurtosis": 1, "gated_activation": 8, "masked_norm": 5}.get(case.op, 4)
    return reads_and_writes * case.rows * case.width * torch.finfo(session.dtype).bits // 8


def measure_pass(case: PassCase, session: Session) -> None:
    """Compare, then time forward with backward (the kurtosis and the sums have no backward)."""
    right = right_passes(case, session)
    copies = [make_pass(case, session, 10 * n) for n in range(session.num_copies(moved_bytes(case, session) // 2))]
    calls: dict[str, list[Call]] = {name: [_call(case, tensors, name) for tensors in copies] for name in right}
    times = session.clock.interleaved(calls)
    rows = []
    for name, taken in times.items():
        row = case.columns() | {"what": "pass", "implementation": name} | taken.columns()
        rate = round(moved_bytes(case, session) / taken.median / 1e6, 1)
        rows.append(row | {"value": rate, "unit": "GB/s"} | right[name])
    session.write(rows)


def _call(case: PassCase, tensors: dict[str, Tensor], name: str) -> Callable[[], object]:
    return lambda: run_pass(case, tensors, name)
