"""Eager PyTorch implementations with hand-written backward: the path wherever no kernel is proven faster.

Each does the fewest passes over the large tensors: the masked linear saves x and the rank-R product only, adds the
low-rank part into the frozen product in place, and computes just the gradients that are asked for.

Dimension key: T tokens, I in, O out, R rank, D features.
"""

from typing import Any

import torch
from torch import Tensor

Grad = Tensor | None


def _dropout_scale(z_TR: Tensor, p: float, seed: int) -> Tensor:
    """0 where dropped, 1 / (1 - p) elsewhere: drawn from the seed, so backward draws it again and saves nothing."""
    generator = torch.Generator(z_TR.device).manual_seed(seed)
    keep_TR = torch.rand(z_TR.shape, generator=generator, device=z_TR.device) >= p
    return keep_TR.to(z_TR.dtype) / (1.0 - p)


class MaskedLoraLinear(torch.autograd.Function):
    """Forward and backward of ``m_out * (W xm + b + s B (g * drop(A xm)))`` with ``xm = m_in * x``; x is ``[T, I]``."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TI: Tensor,
        weight_OI: Tensor,
        a_RI: Tensor,
        b_OR: Tensor,
        bias: Tensor | None,
        gate: Tensor | None,
        mask_in: Tensor | None,
        mask_out: Tensor | None,
        scale: float,
        dropout: float,
        seed: int,
    ) -> Tensor:
        dtype = x_TI.dtype
        xm_TI = x_TI if mask_in is None else x_TI * mask_in.to(dtype)
        z_TR = xm_TI @ a_RI.to(dtype).T
        gated_TR = MaskedLoraLinear._gated(z_TR, gate, dropout, seed)
        y_TO = xm_TI @ weight_OI.T if bias is None else torch.addmm(bias.to(dtype), xm_TI, weight_OI.T)
        y_TO.addmm_(gated_TR, b_OR.to(dtype).T, alpha=scale)
        if mask_out is not None:
            y_TO.mul_(mask_out.to(dtype))
        ctx.save_for_backward(x_TI, z_TR, weight_OI, a_RI, b_OR, gate, mask_in, mask_out)
        ctx.scale, ctx.dropout, ctx.seed = scale, dropout, seed
        return y_TO

    @staticmethod
    def _gated(z_TR: Tensor, gate: Tensor | None, dropout: float, seed: int) -> Tensor:
        if dropout > 0.0:
            z_TR = z_TR * _dropout_scale(z_TR, dropout, seed)
        return z_TR if gate is None else z_TR * gate.to(z_TR.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Grad, ...]:
        x_TI, z_TR, weight_OI, a_RI, b_OR, gate, mask_in, mask_out = ctx.saved_tensors
        needs_x, _, needs_a, needs_b, _, needs_gate, *_ = ctx.needs_input_grad
        dtype, scale = x_TI.dtype, ctx.scale
        dy_TO = grads[0] if mask_out is None else grads[0] * mask_out.to(dtype)
        grad_x = grad_a = grad_b = grad_gate = None

        if needs_b:
            gated_TR = MaskedLoraLinear._gated(z_TR, gate, ctx.dropout, ctx.seed)
            # [R, T] @ [T, O] and a transpose: several times faster on CPU than [O, T] @ [T, R]
            grad_b = (gated_TR.T @ dy_TO).T.to(b_OR.dtype) * scale
        if needs_x or needs_a or needs_gate:
            dz_TR = (dy_TO @ b_OR.to(dtype)).mul_(scale)  # gradient of the gated product
            kept_TR = _dropout_scale(z_TR, ctx.dropout, ctx.seed) if ctx.dropout > 0.0 else None
            if needs_gate:
                rows_TR = dz_TR * (z_TR if kept_TR is None else z_TR * kept_TR)
                grad_gate = (rows_TR.sum(0) if gate.dim() == 1 else rows_TR).to(gate.dtype)
            if gate is not None:
                dz_TR = dz_TR * gate.to(dtype)
            if kept_TR is not None:
                dz_TR = dz_TR * kept_TR
            if needs_a:
                grad_a = (dz_TR.T @ x_TI).to(a_RI.dtype)
                grad_a = grad_a if mask_in is None else grad_a.mul_(mask_in.to(a_RI.dtype))
            if needs_x:
                grad_x = dy_TO @ weight_OI
                grad_x.addmm_(dz_TR, a_RI.to(dtype))
                grad_x = grad_x if mask_in is None else grad_x.mul_(mask_in.to(dtype))
        return grad_x, None, grad_a, grad_b, None, grad_gate, None, None, None, None, None


def column_sums(x_TD: Tensor, valid_T: Tensor | None) -> Tensor:
    """``sum_t valid_t |x_t|`` in at least float32: ``[D]``. One pass to take the magnitude, one to reduce."""
    dtype = torch.promote_types(x_TD.dtype, torch.float32)
    if valid_T is None:
        sums_D: Tensor = torch.linalg.vector_norm(x_TD, ord=1, dim=0, dtype=dtype)
        return sums_D
    return valid_T.to(dtype) @ x_TD.abs().to(dtype)


class Gate(torch.autograd.Function):
    """``h * m``; backward adds the column sums of ``|h|`` and of the upstream ``|dL/dy|``, and the token count."""

    @staticmethod
    def forward(
        ctx: Any,
        h_TD: Tensor,
        mask: Tensor | None,
        sums_2D: Tensor | None,
        count: Tensor | None,
        valid_T: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(mask, valid_T)
        ctx.sums_2D, ctx.count = sums_2D, count
        # Added to `sums` in backward only, so a forward that is recomputed or thrown away counts for nothing.
        ctx.abs_D = column_sums(h_TD, valid_T) if sums_2D is not None else None
        return h_TD.view_as(h_TD) if mask is None else h_TD * mask.to(h_TD.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Grad, ...]:
        mask, valid_T = ctx.saved_tensors
        dy_TD = grads[0]
        if ctx.sums_2D is not None:
            ctx.sums_2D[0] += ctx.abs_D
            ctx.sums_2D[1] += column_sums(dy_TD, valid_T)
            ctx.count += dy_TD.shape[0] if valid_T is None else valid_T.sum()
        return (dy_TD if mask is None else dy_TD * mask.to(dy_TD.dtype)), None, None, None, None


class MaskedNorm(torch.autograd.Function):
    """LayerNorm (``centred``) or RMSNorm with mask-weighted statistics, sums in at least float32."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, eps: float, centred: bool
    ) -> Tensor:
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        x = x_TD.to(wide)
        share = (
            torch.full_like(weight, 1.0 / weight.numel(), dtype=wide) if mask is None else mask.to(wide) / mask.sum()
        )
        if centred:
            x = x - (x @ share)[:, None]
        rstd_T = torch.rsqrt(x.square() @ share + eps)[:, None]
        xhat_TD = x * rstd_T
        y_TD = xhat_TD * weight.to(wide)
        y_TD = y_TD if bias is None else y_TD + bias.to(wide)
        ctx.save_for_backward(xhat_TD, rstd_T, weight, bias, share)
        ctx.centred = centred
        return y_TD.to(x_TD.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Grad, ...]:
        xhat_TD, rstd_T, weight, bias, share = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        dy_TD = grads[0].to(xhat_TD.dtype)
        grad_x = grad_weight = grad_bias = None
        if needs_x:
            g_TD = dy_TD * weight.to(dy_TD.dtype)
            along = xhat_TD * (g_TD * xhat_TD).sum(-1, keepdim=True)
            if ctx.centred:
                along = along + g_TD.sum(-1, keepdim=True)
            grad_x = (rstd_T * (g_TD - share * along)).to(grads[0].dtype)
        if needs_weight:
            grad_weight = (dy_TD * xhat_TD).sum(0).to(weight.dtype)
        if needs_bias:
            grad_bias = dy_TD.sum(0).to(bias.dtype)
        return grad_x, grad_weight, grad_bias, None, None, None
