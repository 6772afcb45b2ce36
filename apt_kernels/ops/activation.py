"""The public op of gated activations: checks, the choice of implementation, registered ops, autograd."""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from apt_kernels import eager
from apt_kernels.ops.registered import computed_by, or_empty
from apt_kernels.ops.statistics import add_statistics, collected
from apt_kernels.selection import by_kernels, require

KINDS = ("silu", "gelu", "gelu_tanh")


def gated_activation(
    g: Tensor,
    u: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    kind: Literal["silu", "gelu", "gelu_tanh"],
    sums: Tensor | None = None,
    count: Tensor | None = None,
    valid: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``gate(act(g) * u, mask)`` in one pass: SwiGLU, GeGLU, or without `u` a plain activation, and its unit mask.

    `sums`, `count` and `valid` collect the statistics of `gate`, of ``h = act(g) * u`` before the mask.

    Args:
        g: ``[..., D]``.
        u: the shape and dtype of g; None is all ones.
        mask: ``[D]``, 1 kept, 0 pruned, between while it decays; None is all ones.
        kind: "silu", "gelu" (by erf) or "gelu_tanh".
        sums: ``[2, D]``, at least float32, accumulated in place by the backward pass.
        count: ``[]`` or ``[1]``, float, likewise; required with `sums`.
        valid: 1 where a token is real, 0 where it is padding, the leading shape of g; None is all real.
        backend: forces an implementation; None chooses.

    Returns:
        ``[..., D]`` in the dtype of g. What backward keeps is g and u.

    Raises:
        ValueError: shapes or dtypes disagree, the kind is unknown, or the backend does not exist.
    """
    op, D = "gated_activation", g.shape[-1]
    require(op, {"u": (u, tuple(g.shape)), "mask": (mask, (D,)), "sums": (sums, (2, D))})
    require(op, {"valid": (valid, tuple(g.shape[:-1]))})
    if u is not None and u.dtype != g.dtype:
        raise ValueError(f"{op}: g is {g.dtype} but u is {u.dtype}; cast one")
    if kind not in KINDS:
        raise ValueError(f"{op}: kind must be one of {list(KINDS)}, got {kind!r}")
    learns = g.requires_grad or (u is not None and u.requires_grad)
    statistics = collected(op, sums, count, valid, learns)
    flat = (math.prod(g.shape[:-1]), D)
    u_TD = None if u is None else u.reshape(flat)
    kernels = by_kernels(op, g, backend)
    return _activation(g.reshape(flat), u_TD, mask, kind, *statistics, kernels, backend).view(g.shape)


@torch.library.custom_op("apt_kernels::gated_activation_forward", mutates_args=())
def _activation_forward(
    g_TD: Tensor,
    u_TD: Tensor | None,
    mask: Tensor | None,
    valid_T: Tensor | None,
    kind: str,
    collect: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """``h * m``, and ``sum_t valid_t |h_t|`` or empty where there is nothing to collect."""
    run = computed_by("gated_activation", g_TD, backend)
    y_TD, sums_D = run.activation_forward(g_TD, u_TD, mask, valid_T, kind, collect)
    return y_TD, or_empty(sums_D, g_TD, torch.float32)


@_activation_forward.register_fake
def _(g_TD: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    collect = rest[-2]
    return g_TD.new_empty(g_TD.shape), g_TD.new_empty(g_TD.shape[1] if collect else 0, dtype=torch.float32)


@torch.library.custom_op("apt_kernels::gated_activation_backward", mutates_args=())
def _activation_backward(
    dy_TD: Tensor,
    g_TD: Tensor,
    u_TD: Tensor | None,
    mask: Tensor | None,
    valid_T: Tensor | None,
    kind: str,
    collect: bool,
    needs_g: bool,
    needs_u: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of g and u, and ``sum_t valid_t |dy_t|``; empty where not needed."""
    run, needs = computed_by("gated_activation", g_TD, backend), (needs_g, needs_u)
    dg_TD, du_TD, sums_D = run.activation_backward(dy_TD, g_TD, u_TD, mask, valid_T, kind, collect, needs)
    return or_empty(dg_TD, g_TD), or_empty(du_TD, g_TD), or_empty(sums_D, g_TD, torch.float32)


@_activation_backward.register_fake
def _(dy_TD: Tensor, g_TD: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    collect, needs_g, needs_u = rest[-4:-1]
    return (
        g_TD.new_empty(g_TD.shape if needs_g else 0),
        g_TD.new_empty(g_TD.shape if needs_u else 0),
        g_TD.new_empty(g_TD.shape[1] if collect else 0, dtype=torch.float32),
    )


class _GatedActivation(torch.autograd.Function):
    """``act(g) * u * m`` with the statistics of `gate`; saves g and u, and takes the activation again in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        g_TD: Tensor,
        u_TD: Tensor | None,
        mask: Tensor | None,
        kind: str,
        sums_2D: Tensor | None,
        count: Tensor | None,
        valid_T: Tensor | None,
        kernels: bool,
        backend: str | None,
    ) -> Tensor:
        ctx.save_for_backward(g_TD, u_TD, mask)
        ctx.valid_T = valid_T  # not saved, as in `gate`
        ctx.kind, ctx.sums_2D, ctx.count, ctx.kernels, ctx.backend = kind, sums_2D, count, kernels, backend
        given = (g_TD, u_TD, mask, valid_T, kind, sums_2D is not None)
        y_TD, ctx.abs_D = _activation_forward(*given, backend) if kernels else eager.activation_forward(*given)
        return y_TD

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:2]
        g_TD, u_TD, mask = ctx.saved_tensors
        valid_T = ctx.valid_T
        given = (grads[0], g_TD, u_TD, mask, valid_T, ctx.kind, ctx.sums_2D is not None)
        if ctx.kernels:
            dg_TD, du_TD, abs_D = _activation_backward(*given, *needs, ctx.backend)
        else:
            dg_TD, du_TD, abs_D = eager.activation_backward(*given, needs)
        if ctx.sums_2D is not None:
            add_statistics(ctx, abs_D, grads[0].shape[0], valid_T)
        return dg_TD if needs[0] else None, du_TD if needs[1] else None, *[None] * 7


_activation: Callable[..., Tensor] = _GatedActivation.apply  # torch leaves it untyped
