"""Norms with mask-weighted statistics. Dimension key: T tokens, D features."""

from typing import Any

import torch
from torch import Tensor

from apt_kernels.autocast import outside_autocast

Grad = Tensor | None


def norm_share(weight: Tensor, mask: Tensor | None, wide: torch.dtype) -> Tensor:
    """What each dimension weighs in the statistics: ``m / sum m``, 0 where every mask is."""
    if mask is None:
        return torch.full_like(weight, 1.0 / max(weight.numel(), 1), dtype=wide)
    mask = mask.to(wide)
    return mask / mask.sum().clamp(min=torch.finfo(wide).tiny)


def _normalise(x_TD: Tensor, share: Tensor, eps: float, centred: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The normalised rows, and the mean and 1 / deviation of each, ``[T, 1]``."""
    x_TD = x_TD.to(share.dtype)
    mean_T = (x_TD @ share)[:, None] if centred else x_TD.new_zeros(x_TD.shape[0], 1)
    if centred:
        x_TD = x_TD - mean_T
    rstd_T = torch.rsqrt(x_TD.square() @ share + eps)[:, None]
    return x_TD * rstd_T, mean_T, rstd_T


def _affine(xhat_TD: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y_TD = xhat_TD * weight.to(xhat_TD.dtype)
    return y_TD if bias is None else y_TD + bias.to(xhat_TD.dtype)


@outside_autocast
def norm_forward(
    x_TD: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, eps: float, centred: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The norm, and the mean and 1 / deviation of each row, ``[T]``, in at least float32."""
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    xhat_TD, mean_T, rstd_T = _normalise(x_TD, norm_share(weight, mask, wide), eps, centred)
    y_TD = _affine(xhat_TD, weight, bias)
    # In torch 2.11 an output that `to` hands on as it is has no gradient in a compiled graph.
    y_TD = y_TD if y_TD.dtype == x_TD.dtype else y_TD.to(x_TD.dtype)
    return y_TD, mean_T[:, 0], rstd_T[:, 0]


@outside_autocast
def norm_backward(
    dy_TD: Tensor,
    x_TD: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    mean_T: Tensor,
    rstd_T: Tensor,
    centred: bool,
    needs: tuple[bool, bool, bool],
) -> tuple[Grad, Grad, Grad]:
    """Gradients of x, in its dtype, and of weight and bias, in at least float32; None where not needed."""
    wide = rstd_T.dtype
    x_TD_wide = x_TD.to(wide)
    xhat_TD = (x_TD_wide - mean_T[:, None] if centred else x_TD_wide) * rstd_T[:, None]
    share = norm_share(weight, mask, wide)
    found = _gradients(dy_TD.to(wide), xhat_TD, rstd_T[:, None], weight, share, centred, needs)
    grad_x, grad_weight, grad_bias = found
    return None if grad_x is None else grad_x.to(x_TD.dtype), grad_weight, grad_bias


def _gradients(
    dy_TD: Tensor,
    xhat_TD: Tensor,
    rstd_T: Tensor,
    weight: Tensor,
    share: Tensor,
    centred: bool,
    needs: tuple[bool, bool, bool],
) -> tuple[Grad, Grad, Grad]:
    """Gradients of x, weight and bias in the wide dtype of `dy_TD` and `xhat_TD`; None where not needed."""
    grad_x = None
    if needs[0]:
        g_TD = dy_TD * weight.to(dy_TD.dtype)
        along = xhat_TD * (g_TD * xhat_TD).sum(-1, keepdim=True)
        if centred:
            along = along + g_TD.sum(-1, keepdim=True)
        grad_x = rstd_T * (g_TD - share * along)
    return grad_x, (dy_TD * xhat_TD).sum(0) if needs[1] else None, dy_TD.sum(0) if needs[2] else None


class MaskedNorm(torch.autograd.Function):
    """LayerNorm (``centred``) or RMSNorm with mask-weighted statistics, in at least float32; keeps x as it came."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, eps: float, centred: bool
    ) -> Tensor:
        y_TD, mean_T, rstd_T = norm_forward(x_TD, weight, bias, mask, eps, centred)
        ctx.save_for_backward(x_TD, weight, bias, mask, mean_T, rstd_T)
        ctx.centred = centred
        return y_TD

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Grad, ...]:
        x_TD, weight, bias, mask, mean_T, rstd_T = ctx.saved_tensors
        found = norm_backward(grads[0], x_TD, weight, mask, mean_T, rstd_T, ctx.centred, ctx.needs_input_grad[:3])
        of_learnt = (
            None if grad is None else grad.to(learnt.dtype)
            for grad, learnt in zip(found, (x_TD, weight, bias), strict=True)
        )
        return *of_learnt, None, None, None  # mask, eps, centred
