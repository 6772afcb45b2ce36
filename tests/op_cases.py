"""Every op on tensors by name, ours and what it must equal, for tests that ask the same of all of them.

Axes: T tokens, D features in and out, R rank.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from check import no_worse_than_eager
from torch import Tensor

from apt_kernels import column_sums, gate, gated_activation, masked_lora_linear, masked_norm, reference

R, EPS, SCALE = 24, 1e-6, 0.7
Tensors = dict[str, Tensor]


class Op(NamedTuple):
    """An op and its reference, both by the names of what they take."""

    ours: Callable[..., Tensor]
    stated: Callable[..., Tensor]
    axes: dict[str, str]  # of each tensor it takes
    learnt: tuple[str, ...]  # those that get a gradient


def stated_linear(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, **more: Tensor) -> Tensor:
    return reference.masked_lora_linear(x, weight, a, b, scale=SCALE, **more)


def stated_gate(h: Tensor, mask: Tensor) -> Tensor:
    return h * mask


def stated_activation(g: Tensor, u: Tensor, mask: Tensor) -> Tensor:
    return reference.gated_activation(g, u, mask, kind="silu")


def stated_norm(x: Tensor, weight: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    return reference.masked_norm(x, weight, bias, mask, eps=EPS, kind="layer")


def stated_sums(x: Tensor, valid: Tensor) -> Tensor:
    return reference.column_sums(x.to(torch.promote_types(x.dtype, torch.float32)), valid)


PLAIN = {"x": "TD", "weight": "DD", "a": "RD", "b": "DR"}
MASKED = PLAIN | {"bias": "D", "gate": "R", "mask_in": "D", "mask_out": "D"}


def linear(implementation: str, axes: dict[str, str]) -> Op:
    ours = partial(masked_lora_linear, scale=SCALE, backend=implementation)
    return Op(ours, stated_linear, axes, ("x", "a", "b", "gate") if "gate" in axes else ("x", "a", "b"))


OPS = {
    "gate": Op(partial(gate, backend="triton"), stated_gate, {"h": "TD", "mask": "D"}, ("h",)),
    "column_sums": Op(partial(column_sums, backend="triton"), stated_sums, {"x": "TD", "valid": "T"}, ()),
    "gated_activation": Op(
        partial(gated_activation, kind="silu", backend="triton"),
        stated_activation,
        {"g": "TD", "u": "TD", "mask": "D"},
        ("g", "u"),
    ),
    "masked_norm": Op(
        partial(masked_norm, eps=EPS, kind="layer", backend="triton"),
        stated_norm,
        {"x": "TD", "weight": "D", "bias": "D", "mask": "D"},
        ("x", "weight", "bias"),
    ),
    "split_cublas": linear("split_cublas", MASKED),
    "split_triton": linear("split_triton", MASKED),
    "split_triton, plain": linear("split_triton", PLAIN),  # by tensor descriptors, where there are any
    "one_kernel": linear("one_kernel", MASKED),
}


def make(op: Op, T: int, D: int, dtype: torch.dtype, device: str, ends: int | None = None) -> tuple[Tensors, Tensor]:
    """What the op takes, and a gradient of its output. With `ends`, rows are 0 but for so many at either end."""
    sizes = {"T": T, "D": D, "R": R}

    def draw(name: str, axes: str) -> Tensor:
        shape = [sizes[axis] for axis in axes]
        if name.startswith(("mask", "valid")):  # some shut, some open, masks on their way too
            return torch.randint(0, 3, shape, device=device).clamp(max=1 if axes == "T" else 2).to(dtype) / 2
        if axes != "TD":
            return (torch.randn(shape, device=device) / D ** (0.5 * (len(axes) == 2))).to(dtype)
        values = torch.zeros(shape, dtype=dtype, device=device)
        for part in (values,) if ends is None else (values[:ends], values[-ends:]):
            part.copy_(torch.randn_like(part, dtype=torch.float32))
        return values

    tensors = {name: draw(name, axes) for name, axes in op.axes.items()}
    return tensors, draw("upstream", "TD") / min(T, 2 * (ends or T)) ** 0.5


def run(op: Op, call: Callable[..., Tensor], tensors: Tensors, upstream: Tensor) -> Tensors:
    """Output and every gradient. The leaves are new, so that what autograd notes of them is of this run."""
    leaves = {name: t.detach().requires_grad_(name in op.learnt) for name, t in tensors.items()}
    y = call(**leaves)
    learnt = {name: leaves[name] for name in op.learnt}
    grads = torch.autograd.grad(y, list(learnt.values()), upstream) if learnt else ()
    return {"y": y.detach()} | {f"grad of {name}": grad for name, grad in zip(learnt, grads, strict=True)}


def compare(op: Op, got: Tensors, tensors: Tensors, upstream: Tensor) -> None:
    """Ours errs no more than the reference does in the same dtype."""
    eager = run(op, op.stated, tensors, upstream)
    doubles = {name: t.double() for name, t in tensors.items()}
    truth = run(op, op.stated, doubles, upstream.double())
    for name in truth:
        no_worse_than_eager(name, got[name], eager[name], truth[name])
