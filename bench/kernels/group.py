"""Adapted layers that share their input (q, k, v; gate, up) against as many frozen ones (G8)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

import apt_kernels
from apt_kernels import reference
from bench.baselines import leaf
from bench.kernels.linear import ALLOWED, SCALE, verdict
from bench.kernels.session import Session, implementations, normal, relative_error
from bench.timing import Call

OP = "masked_lora_linears"
Forward = Callable[[], list[Tensor]]


@dataclass(frozen=True, kw_only=True)
class GroupCase:
    """Layers of one width on one input."""

    tokens: int
    d_in: int
    d_out: int  # of each layer
    rank: int  # of each layer
    layers: int

    @property
    def name(self) -> str:
        return f"group {self.layers} of {self.d_in}x{self.d_out} T={self.tokens} r={self.rank}"

    @property
    def key_sizes(self) -> tuple[int, int, int, int]:
        """What selection looks the group up by: outputs and ranks of all layers."""
        return self.tokens, self.d_in, self.layers * self.d_out, self.layers * self.rank

    def columns(self) -> dict[str, Any]:
        sizes = {"tokens": self.tokens, "d_in": self.d_in, "d_out": self.d_out, "rank": self.rank}
        return {"case": self.name, "op": OP, "layer": f"group of {self.layers}"} | sizes


@dataclass(frozen=True)
class GroupInputs:
    x: Tensor
    weights: list[Tensor]
    a: list[Tensor]
    b: list[Tensor]
    dys: list[Tensor]

    def to(self, dtype: torch.dtype) -> "GroupInputs":
        lists = ([t.to(dtype) for t in part] for part in (self.weights, self.a, self.b, self.dys))
        return GroupInputs(self.x.to(dtype), *lists)


def make_group(case: GroupCase, session: Session, seed: int) -> GroupInputs:
    draw = partial(normal, session=session, generator=session.generator(seed))
    T, I, O, R, each = case.tokens, case.d_in, case.d_out, case.rank, range(case.layers)
    return GroupInputs(
        draw((T, I)),
        [draw((O, I), over=I) for _ in each],
        [draw((R, I), over=I).float() for _ in each],
        [draw((O, R), over=R).float() for _ in each],
        [draw((T, O)) for _ in each],
    )


def frozen(inputs: GroupInputs) -> tuple[Forward, list[Tensor]]:
    """As many cuBLAS products; autograd adds up dx."""
    x = leaf(inputs.x)
    return (lambda: [linear(x, weight) for weight in inputs.weights]), [x]


def one_by_one(inputs: GroupInputs, op: Any, **named: Any) -> tuple[Forward, list[Tensor]]:
    x, a, b = leaf(inputs.x), [leaf(t) for t in inputs.a], [leaf(t) for t in inputs.b]

    def forward() -> list[Tensor]:
        return [op(x, *layer, scale=SCALE, **named) for layer in zip(inputs.weights, a, b, strict=True)]

    return forward, [x, *a, *b]


def together(inputs: GroupInputs, backend: str) -> tuple[Forward, list[Tensor]]:
    x, a, b = leaf(inputs.x), [leaf(t) for t in inputs.a], [leaf(t) for t in inputs.b]
    named: dict[str, Any] = {"scale": SCALE, "backend": backend}
    return (lambda: apt_kernels.masked_lora_linears(x, inputs.weights, a, b, **named)), [x, *a, *b]


def results(built: tuple[Forward, list[Tensor]], inputs: GroupInputs) -> dict[str, Tensor]:
    """Outputs and gradients by name."""
    forward, leaves = built
    ys = forward()
    grads = torch.autograd.grad(ys, leaves, [dy.to(y.dtype) for y, dy in zip(ys, inputs.dys, strict=True)])
    named = {f"y{n}": y.detach() for n, y in enumerate(ys)} | {"dx": grads[0]}
    count = len(ys)
    adapters = zip((f"d{kind}{n}" for kind in "ab" for n in range(count)), grads[1:], strict=False)
    return named | dict(adapters)


def judge_group(case: GroupCase, session: Session) -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """Implementations that are right, with the columns that say how right; the others are written down."""
    inputs, columns = make_group(case, session, 0), case.columns()
    truth = results(one_by_one(inputs.to(torch.float64), reference.masked_lora_linear), inputs)
    rounded = results(one_by_one(inputs.to(session.dtype), reference.masked_lora_linear), inputs)
    eager = {name: relative_error(rounded[name], truth[name]) for name in truth}
    usable, reasons = implementations(OP, inputs.x)
    session.write([columns | {"implementation": n, "status": "unavailable", "note": why} for n, why in reasons.items()])
    right: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {}
    for name in usable:
        if session.skipped(case.name, name):
            continue
        build = partial(together, backend=name)
        try:
            apt_kernels.reset_calls()
            got = results(build(inputs), inputs)
            session.synchronise()
        except Exception as error:
            session.failed(case.name, name, error, op=OP)
            continue
        if name in session.planted:
            got["dx"] = got["dx"] * 1.5
        mine = {key: relative_error(got[key], truth[key]) for key in truth}
        found = verdict(mine, eager, ALLOWED, session.dtype)
        if name not in apt_kernels.calls().get(OP, {}):
            found |= {"status": "wrong", "note": f"ran {apt_kernels.calls()} instead"}
        if found["status"] == "ok":
            right[name] = (build, found)
        else:
            session.write([columns | found | {"implementation": name}])
    return right


def call_of(built: tuple[Forward, list[Tensor]], inputs: GroupInputs) -> Call:
    forward, leaves = built
    return lambda: torch.autograd.grad(forward(), leaves, inputs.dys)


def measure_group(case: GroupCase, session: Session) -> None:
    """Forward with backward of the group, beside the frozen layers and our layers one by one."""
    right = judge_group(case, session)
    builds: dict[str, Callable[..., Any]] = {name: build for name, (build, _) in right.items()}
    single = [
        name for name in implementations("masked_lora_linear", make_group(case, session, 0).x)[0] if name in right
    ]
    for name in single:
        builds[f"one by one, {name}"] = partial(one_by_one, op=apt_kernels.masked_lora_linear, backend=name)
    builds["frozen"] = frozen
    copies = [make_group(case, session, 10 * n) for n in range(2)]
    calls = {name: [call_of(build(inputs), inputs) for inputs in copies] for name, build in builds.items()}
    times = session.clock.interleaved(calls)
    rows = []
    for name, taken in times.items():
        row = case.columns() | {"what": "forward+backward", "implementation": name} | taken.columns()
        rate = 4 * case.tokens * case.d_in * case.d_out * case.layers / taken.median / 1e9  # of the frozen part
        row |= {"ratio": round(taken.median / times["frozen"].median, 4), "value": round(rate, 1), "unit": "TFLOP/s"}
        rows.append(row | (right[name][1] if name in right else {}))
    session.write(rows)
