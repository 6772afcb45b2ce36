"""The adapted linear layer: every implementation and baseline compared with float64, then timed side by side."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import apt_kernels
from apt_kernels import reference
from bench.baselines import BASELINES, MASKED, Built, Inputs, leaf
from bench.kernels.session import LEFT_OUT, Session, implementations, normal, relative_error, split_off_never
from bench.timing import Call, Times, as_graph

OP, SCALE = "masked_lora_linear", 0.7
ALLOWED = 1.2  # of eager's error, for ours (G17)
ALLOWED_BASELINE = 2.0  # a baseline beyond it computes something else
FLOOR = {torch.float32: 1e-6, torch.bfloat16: 0.0}  # errors below are equal, whatever their ratio
MASKS = ("plain", "binary", "decay", "out", "in", "gate")
TARGETS = ("y", "dx", "da", "db", "dgate")


@dataclass(frozen=True, kw_only=True)
class LinearCase:
    """One shape, rank and kind of masks."""

    layer: str
    tokens: int
    d_in: int
    d_out: int
    rank: int
    masks: str = "plain"
    graph: bool = False  # replayed as a CUDA graph

    @property
    def name(self) -> str:
        mode = " graph" if self.graph else ""
        return f"linear {self.layer} T={self.tokens} r={self.rank} {self.masks}{mode}"

    def columns(self) -> dict[str, Any]:
        sizes = {"tokens": self.tokens, "d_in": self.d_in, "d_out": self.d_out, "rank": self.rank}
        return {"case": self.name, "op": OP, "layer": self.layer, "masks": self.masks} | sizes


def make_inputs(case: LinearCase, session: Session, seed: int) -> Inputs:
    """Random inputs that give outputs of about unit variance; never zeros, which a GPU multiplies faster."""
    draw = partial(normal, session=session, generator=session.generator(seed))
    T, I, O, R = case.tokens, case.d_in, case.d_out, case.rank
    return Inputs(
        x=draw((T, I)),
        weight=draw((O, I), over=I),
        a=draw((R, I), over=I).float(),
        b=draw((O, R), over=R).float(),
        dy=draw((T, O)),
        scale=SCALE,
        gate=draw((R,)).float() if case.masks == "gate" else None,
        mask_in=_mask(case, I, session, seed) if case.masks in ("binary", "decay", "in") else None,
        mask_out=_mask(case, O, session, seed + 1) if case.masks in ("binary", "decay", "out", "gate") else None,
    )


def _mask(case: LinearCase, size: int, session: Session, seed: int) -> Tensor:
    drawn = torch.rand(size, device=session.device, generator=session.generator(seed))
    mask = (drawn > 0.5) if case.masks == "binary" else 0.1 + 0.9 * drawn
    return mask.to(session.dtype).float()  # a value that both dtypes hold


def ours(inputs: Inputs, backend: str) -> Built:
    """The public op through one implementation; adapters and their gradients in float32."""
    x, a, b = leaf(inputs.x), leaf(inputs.a), leaf(inputs.b)
    gate = None if inputs.gate is None else leaf(inputs.gate)
    named = {"scale": inputs.scale, "gate": gate, "mask_in": inputs.mask_in, "mask_out": inputs.mask_out}

    def forward() -> Tensor:
        return apt_kernels.masked_lora_linear(x, inputs.weight, a, b, **named, backend=backend)

    return forward, [x, a, b, *([] if gate is None else [gate])]


def referenced(inputs: Inputs) -> Built:
    """The op as plain PyTorch, in the dtype of its inputs: the truth in float64, and eager."""
    x, a, b = leaf(inputs.x), leaf(inputs.a), leaf(inputs.b)
    gate = None if inputs.gate is None else leaf(inputs.gate)
    named = {"scale": inputs.scale, "gate": gate, "mask_in": inputs.mask_in, "mask_out": inputs.mask_out}
    forward = partial(reference.masked_lora_linear, x, inputs.weight, a, b, **named)
    return forward, [x, a, b, *([] if gate is None else [gate])]


def contestants(case: LinearCase, inputs: Inputs, session: Session) -> dict[str, Callable[[Inputs], Built]]:
    """Baselines and implementations by name. Those that cannot or never should run here get a row that says why."""
    names = [name for name in BASELINES if case.masks == "plain" or name in MASKED]
    usable, reasons = implementations(OP, inputs.x)
    timed, never = split_off_never(usable, case.d_out, case.rank)
    for status, said in (("unavailable", reasons), (LEFT_OUT, never)):
        rows = [{"implementation": name, "status": status, "note": why} for name, why in said.items()]
        session.write([case.columns() | row for row in rows])
    return {name: BASELINES[name] for name in names} | {name: partial(ours, backend=name) for name in timed}


def gradients(built: Built, dy: Tensor) -> list[Tensor]:
    """Output and gradients: y, dx, da, db and, where there is a gate, its own."""
    forward, leaves = built
    y = forward()
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def errors(got: list[Tensor], truth: list[Tensor]) -> dict[str, float]:
    return {name: relative_error(g, t) for name, g, t in zip(TARGETS, got, truth, strict=False)}


def oracle(inputs: Inputs, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, float]]:
    """The truth in float64, and what eager PyTorch errs in the dtype."""
    truth = gradients(referenced(inputs.to(torch.float64)), inputs.dy)
    return truth, errors(gradients(referenced(inputs.to(dtype)), inputs.dy), truth)


def verdict(mine: dict[str, float], eager: dict[str, float], allowed: float, dtype: torch.dtype) -> dict[str, Any]:
    """Columns that say how far a contestant is from the truth, and whether that is too far."""
    name = max(mine, key=lambda key: mine[key] / max(eager[key], 1e-30))
    text = "; ".join(f"{key} {mine[key]:.2e} (eager {eager[key]:.2e})" for key in mine)
    wrong = any(mine[key] > allowed * eager[key] + FLOOR[dtype] for key in mine)
    columns = {"error": f"{mine[name]:.3e}", "eager_error": f"{eager[name]:.3e}", "note": text}
    return columns | {"status": "wrong" if wrong else "ok"}


def compare(
    name: str, build: Callable[[Inputs], Built], inputs: Inputs, oracles: dict[bool, Any], session: Session
) -> dict[str, Any]:
    """Run a contestant once and judge it. The frozen layer has a truth of its own, without the low-rank part."""
    truth, eager = oracles[name == "frozen"]
    apt_kernels.reset_calls()
    got = gradients(build(inputs), inputs.dy)
    if name in session.planted:
        got[0] = got[0] * 1.5
    mine = name not in BASELINES
    columns = verdict(errors(got, truth), eager, ALLOWED if mine else ALLOWED_BASELINE, session.dtype)
    if mine and name not in apt_kernels.calls().get(OP, {}):
        columns |= {"status": "wrong", "note": f"ran {apt_kernels.calls()} instead"}
    return columns


def judge(
    case: LinearCase, session: Session, *, ours_only: bool = False
) -> dict[str, tuple[Callable[[Inputs], Built], dict[str, Any]]]:
    """Those that are right, with the columns that say how right; the others are written down here."""
    inputs = make_inputs(case, session, 0)
    entrants = contestants(case, inputs, session)
    shown = {"frozen": make_frozen(inputs), "adapted": inputs}
    oracles = {key == "frozen": oracle(value, session.dtype) for key, value in shown.items()}
    columns, right = case.columns(), {}
    for name, build in entrants.items():
        if session.skipped(case.name, name) or (ours_only and name in BASELINES):
            continue
        try:
            found = compare(name, build, inputs, oracles, session)
            session.synchronise()
        except ImportError as error:
            session.write([columns | {"implementation": name, "status": "unavailable", "note": str(error)}])
        except Exception as error:
            session.failed(case.name, name, error, **{k: v for k, v in columns.items() if k != "case"})
        else:
            if found["status"] == "ok":
                right[name] = (build, found)
            else:
                session.write([columns | found | {"implementation": name}])
    return right


def make_frozen(inputs: Inputs) -> Inputs:
    """The same without adapter or masks."""
    zeros = torch.zeros_like(inputs.b)
    return Inputs(inputs.x, inputs.weight, inputs.a, zeros, inputs.dy, inputs.scale)


def calls_of(what: str, built: Built, inputs: Inputs) -> Call:
    forward, leaves = built
    if what == "forward":
        return forward
    return lambda: torch.autograd.grad(forward(), leaves, inputs.dy)


def measure(case: LinearCase, session: Session) -> None:
    """Compare, then time forward, and forward with backward."""
    right = judge(case, session)
    first = make_inputs(case, session, 0)
    size = sum(t.numel() * t.element_size() for t in (first.x, first.dy, first.weight))
    copies = [first, *(make_inputs(case, session, 10 * n) for n in range(1, session.num_copies(size)))]
    for what in ("forward+backward",) if case.graph else ("forward", "forward+backward"):
        calls: dict[str, list[Call]] = {}
        for name, (build, _) in right.items():
            made = [calls_of(what, build(inputs), inputs) for inputs in copies]
            if not case.graph or session.device.type != "cuda":
                calls[name] = made
                continue
            try:
                calls[name] = [as_graph(call) for call in made]
            except Exception as error:
                session.failed(case.name, name, error, what=what, op=OP)
        times = session.clock.interleaved(calls)
        session.write([_row(case, what, name, times, right[name][1]) for name in calls])


def _row(case: LinearCase, what: str, name: str, times: dict[str, Times], found: dict[str, Any]) -> dict[str, Any]:
    row = case.columns() | {"what": what, "implementation": name} | times[name].columns()
    row["ratio"] = round(times[name].median / times["frozen"].median, 4) if "frozen" in times else ""
    flops = 2 * case.tokens * case.d_in * case.d_out * (1 if what == "forward" else 2)
    if name != "frozen":
        flops += 2 * case.tokens * case.rank * (case.d_in + case.d_out) * (1 if what == "forward" else 3)
    row["value"], row["unit"] = round(flops / times[name].median / 1e9, 1), "TFLOP/s"
    return row | found
