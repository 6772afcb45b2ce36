"""Inputs of the adapted linear layer and the way to run it, for every test of every implementation."""

from itertools import product
from typing import Any

import torch
from check import no_worse_than_eager
from torch import Tensor

from apt_kernels import masked_lora_linear, reference

SCALE = 0.7
LEARNT = ("x", "a", "b", "gate")
OPTIONS = [
    {"mask_in": m_in, "mask_out": m_out, "bias": bias, "gate": gate}
    for m_in, m_out, bias, gate in product((0, 1), (0, 1), (0, 1), (None, "rank", "row"))
]
EVERYTHING = {"mask_in": 1, "mask_out": 1, "bias": 1, "gate": "row"}


def option_id(options: dict[str, Any]) -> str:
    return "+".join(f"gate per {v}" if k == "gate" else k for k, v in options.items() if v) or "plain"


Inputs = dict[str, Any]  # x, weight, a, b, then what the op takes by name; None where an option is off


def make_inputs(
    lead: tuple[int, ...], I: int, O: int, R: int, device: str, *, mask_in: int, mask_out: int, bias: int, gate: Any
) -> Inputs:
    """Inputs in float64 that give an output of about unit variance, and gradients too."""

    def draw(*shape: int, over: int = 1) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, device=device) / max(1, over) ** 0.5

    def mask(size: int) -> Tensor:  # some shut, some open, some on their way
        return torch.randint(0, 3, (size,), device=device).double() / 2

    return {
        "x": draw(*lead, I),
        "weight": draw(O, I, over=max(I, O)),
        "a": draw(R, I, over=max(I, R)),
        "b": draw(O, R, over=max(O, R)),
        "bias": draw(O) if bias else None,
        "gate": {None: None, "rank": draw(R), "row": draw(*lead, R)}[gate],
        "mask_in": mask(I) if mask_in else None,
        "mask_out": mask(O) if mask_out else None,
    }


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """Fresh leaves in a dtype; those that learn ask for their gradient."""
    return {k: None if t is None else t.detach().to(dtype).requires_grad_(k in LEARNT) for k, t in inputs.items()}


def call(op: Any, inputs: Inputs, **more: Any) -> Tensor:
    named = dict(inputs)
    positional = [named.pop(k) for k in ("x", "weight", "a", "b")]
    return op(*positional, **named, **{"scale": SCALE, **more})


def run(op: Any, inputs: Inputs, upstream: Tensor, **more: Any) -> dict[str, Tensor]:
    """Output and every gradient."""
    leaves = {k: t for k, t in inputs.items() if t is not None and t.requires_grad}
    y = call(op, inputs, **more)
    grads = torch.autograd.grad(y, list(leaves.values()), upstream.to(y.dtype))
    return {"y": y.detach(), **{f"grad of {k}": grad for k, grad in zip(leaves, grads, strict=True)}}


def upstream_of(inputs: Inputs) -> Tensor:
    """A random gradient, so that an index slip in backward is seen."""
    lead = inputs["x"].shape[:-1]
    return torch.randn_like(inputs["x"].new_zeros(*lead, len(inputs["weight"]))) / max(1, lead.numel()) ** 0.5


def against_reference(inputs: Inputs, dtype: torch.dtype, **more: Any) -> None:
    """Ours errs no more than the reference in the same dtype, both against the reference in float64."""
    inputs = {k: None if t is None else t.to(dtype).double() for k, t in inputs.items()}  # all three see the same
    upstream = upstream_of(inputs).to(dtype)
    got = run(masked_lora_linear, cast(inputs, dtype), upstream, **more)
    eager = run(reference.masked_lora_linear, cast(inputs, dtype), upstream)
    truth = run(reference.masked_lora_linear, cast(inputs, torch.float64), upstream)
    assert got.keys() == truth.keys()
    for name in truth:
        no_worse_than_eager(name, got[name], eager[name], truth[name])
