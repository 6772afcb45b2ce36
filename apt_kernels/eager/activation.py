"""The activation of a feed-forward block with its mask. Dimension key: T tokens, D features."""

from typing import Any

import torch
from torch import Tensor

from apt_kernels.eager.statistics import collect, column_sums

Grad = Tensor | None


def _activate(g_TD: Tensor, kind: str) -> Tensor:
    if kind == "silu":
        return torch.nn.functional.silu(g_TD)
    return torch.nn.functional.gelu(g_TD, approximate="tanh" if kind == "gelu_tanh" else "none")


def activation_forward(g_TD: Tensor, u_TD: Tensor | None, mask: Tensor | None, kind: str) -> tuple[Tensor, Tensor]:
    """``h = act(g) * u`` and ``h * m``; one tensor where there is no mask."""
    h_TD = _activate(g_TD, kind)
    h_TD = h_TD if u_TD is None else h_TD * u_TD
    return h_TD, h_TD if mask is None else h_TD * mask.to(h_TD.dtype)


def activation_backward(
    dy_TD: Tensor, g_TD: Tensor, u_TD: Tensor | None, mask: Tensor | None, kind: str, needs: tuple[bool, bool]
) -> tuple[Grad, Grad]:
    """Gradients of g and u; None where not needed."""
    dh_TD = dy_TD if mask is None else dy_TD * mask.to(dy_TD.dtype)
    dg_TD = None
    if needs[0]:
        along = dh_TD if u_TD is None else dh_TD * u_TD
        if kind == "silu":
            dg_TD = torch.ops.aten.silu_backward(along, g_TD)
        else:
            approximate = "tanh" if kind == "gelu_tanh" else "none"
            dg_TD = torch.ops.aten.gelu_backward(along, g_TD, approximate=approximate)
    return dg_TD, dh_TD * _activate(g_TD, kind) if needs[1] else None


class GatedActivation(torch.autograd.Function):
    """``act(g) * u * m`` with the statistics of `Gate`; saves g and u, and takes the activation again in backward."""

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
    ) -> Tensor:
        ctx.save_for_backward(g_TD, u_TD, mask, valid_T)
        ctx.kind, ctx.sums_2D, ctx.count = kind, sums_2D, count
        h_TD, y_TD = activation_forward(g_TD, u_TD, mask, kind)
        ctx.abs_D = column_sums(h_TD, valid_T) if sums_2D is not None else None
        return y_TD

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Grad, ...]:
        g_TD, u_TD, mask, valid_T = ctx.saved_tensors
        needs_g, needs_u, *_ = ctx.needs_input_grad
        if ctx.sums_2D is not None:
            sums_D = column_sums(grads[0], valid_T)
            collect(ctx.sums_2D, ctx.count, ctx.abs_D, sums_D, grads[0].shape[0], valid_T)
        dg_TD, du_TD = activation_backward(grads[0], g_TD, u_TD, mask, ctx.kind, (needs_g, needs_u))
        return dg_TD, du_TD, None, None, None, None, None
