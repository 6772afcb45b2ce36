"""The public op of gated activations: checks, the choice of implementation, registered ops, autograd."""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from apt_kernels import eager, selection
from apt_kernels.selection import by_kernels, require

KINDS = ("silu", "gelu", "gelu_tanh")

_eager_activation: Callable[..., Tensor] = eager.GatedActivation.apply  # torch leaves it untyped


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
    if (sums is None) != (count is None):
        raise ValueError(f"{op}: sums and count go together; give both or neither")
    learns = g.requires_grad or (u is not None and u.requires_grad)
    collect = sums is not None and torch.is_grad_enabled() and learns
    flat = (math.prod(g.shape[:-1]), D)
    arguments = (
        g.reshape(flat),
        None if u is None else u.reshape(flat),
        mask,
        kind,
        sums if collect else None,
        count if collect else None,
        valid.reshape(-1) if collect and valid is not None else None,
    )
    kernels = by_kernels(op, g, backend)
    y = _activation(*arguments, backend) if kernels else _eager_activation(*arguments)
    return y.view(g.shape)


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
    name = selection.choose("gated_activation", g_TD, backend, tuple(g_TD.shape))
    selection.count("gated_activation", name)
    sums_D: Tensor | None
    if name == "torch":
        h_TD, y_TD = eager.activation_forward(g_TD, u_TD, mask, kind)
        sums_D = eager.column_sums(h_TD, valid_T) if collect else None
    else:
        from apt_kernels import activation

        y_TD, sums_D = activation.activation_forward(g_TD, u_TD, mask, valid_T, kind, collect)
    return y_TD, g_TD.new_empty(0, dtype=torch.float32) if sums_D is None else sums_D


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
    name = selection.choose("gated_activation", g_TD, backend, tuple(g_TD.shape))
    selection.count("gated_activation", name)
    needs, sums_D = (needs_g, needs_u), None
    if name == "torch":
        dg_TD, du_TD = eager.activation_backward(dy_TD, g_TD, u_TD, mask, kind, needs)
        sums_D = eager.column_sums(dy_TD, valid_T) if collect else None
    else:
        from apt_kernels import activation

        dg_TD, du_TD, sums_D = activation.activation_backward(dy_TD, g_TD, u_TD, mask, valid_T, kind, collect, needs)
    return (
        g_TD.new_empty(0) if dg_TD is None else dg_TD,
        g_TD.new_empty(0) if du_TD is None else du_TD,
        g_TD.new_empty(0, dtype=torch.float32) if sums_D is None else sums_D,
    )


@_activation_backward.register_fake
def _(dy_TD: Tensor, g_TD: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    collect, needs_g, needs_u = rest[-4:-1]
    return (
        g_TD.new_empty(g_TD.shape if needs_g else 0),
        g_TD.new_empty(g_TD.shape if needs_u else 0),
        g_TD.new_empty(g_TD.shape[1] if collect else 0, dtype=torch.float32),
    )


class _GatedActivation(torch.autograd.Function):
    """`eager.GatedActivation` with one registered op each way."""

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
        backend: str | None,
    ) -> Tensor:
        ctx.save_for_backward(g_TD, u_TD, mask, valid_T)
        ctx.kind, ctx.sums_2D, ctx.count, ctx.backend = kind, sums_2D, count, backend
        y_TD, ctx.abs_D = _activation_forward(g_TD, u_TD, mask, valid_T, kind, sums_2D is not None, backend)
        return y_TD

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        g_TD, u_TD, mask, valid_T = ctx.saved_tensors
        needs_g, needs_u, *_ = ctx.needs_input_grad
        collects = ctx.sums_2D is not None
        dg_TD, du_TD, abs_D = _activation_backward(
            grads[0], g_TD, u_TD, mask, valid_T, ctx.kind, collects, needs_g, needs_u, ctx.backend
        )
        if collects:
            eager.collect(ctx.sums_2D, ctx.count, ctx.abs_D, abs_D, grads[0].shape[0], valid_T)
        return dg_TD if needs_g else None, du_TD if needs_u else None, *[None] * 6


_activation: Callable[..., Tensor] = _GatedActivation.apply  # torch leaves it untyped
