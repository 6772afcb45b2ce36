"""Norms with mask-weighted statistics. Dimension key: T tokens, D features."""

from typing import Any

import torch
from torch import Tensor

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


def norm_forward(
    x_TD: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, eps: float, centred: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The norm, and the mean and 1 / deviation of each row, ``[T]``, in at least float32."""
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    xhat_TD, mean_T, rstd_T = _normalise(x_TD, norm_share(weight, mask, wide), eps, centred)
    return _affine(xhat_TD, weight, bias).to(x_TD.dtype), mean_T[:, 0], rstd_T[:, 0]


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
    """Gradients of x, in its dtype, and of weight and bias, in float32; None where not needed."""
    xhat_TD = (x_TD.float() - mean_T[:, None]) * rstd_T[:, None]
    share = norm_share(weight, mask, rstd_T.dtype)
    found = _gradients(dy_TD.float(), xhat_TD, rstd_T[:, None], weight, share, centred, needs)
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
    """LayerNorm (``centred``) or RMSNorm with mask-weighted statistics, sums in at least float32."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, eps: float, centred: bool
    ) -> Tensor:
        share = norm_share(weight, mask, torch.promote_types(x_TD.dtype, torch.float32))
        xhat_TD, _, rstd_T = _normalise(x_TD, share, eps, centred)
        ctx.save_for_backward(xhat_TD, rstd_T, weight, bias, share)
        ctx.centred = centred
        y_TD = _affine(xhat_TD, weight, bias)
        # In torch 2.11 an output that `to` hands on as it is has no gradient in a compiled graph.
        return y_TD if y_TD.dtype == x_TD.dtype else y_TD.to(x_TD.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Grad, ...]:
        xhat_TD, rstd_T, weight, bias, share = ctx.saved_tensors
        dy_TD = grads[0].to(xhat_TD.dtype)
        found = _gradients(dy_TD, xhat_TD, rstd_T, weight, share, ctx.centred, ctx.needs_input_grad[:3])
        of_learnt = (
            None if grad is None else grad.to(learnt.dtype)
            for grad, learnt in zip(found, (grads[0], weight, bias), strict=True)
        )
        return *of_learnt, None, None, None  # mask, eps, centred
