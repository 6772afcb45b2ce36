"""The masked, adapted linear layer: saves x and the rank-R product only, computes just the gradients asked for.

Dimension key: T tokens, I in, O out, R rank.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Grad = Tensor | None


def _dropout_scale(z_TR: Tensor, p: float, seed: int) -> Tensor:
    """0 where dropped, 1 / (1 - p) elsewhere: drawn from the seed, so backward draws it again and saves nothing."""
    generator = torch.Generator(z_TR.device).manual_seed(seed)
    keep_TR = torch.rand(z_TR.shape, generator=generator, device=z_TR.device) >= p
    return keep_TR.to(z_TR.dtype) / (1.0 - p)


def _gated(z_TR: Tensor, gate: Tensor | None, dropout: float, seed: int) -> Tensor:
    if dropout > 0.0:
        z_TR = z_TR * _dropout_scale(z_TR, dropout, seed)
    return z_TR if gate is None else z_TR * gate.to(z_TR.dtype)


def onto(y: Tensor, left: Tensor, right: Tensor, scale: float) -> Tensor:
    """``y + scale * left @ right``, in the memory of y; a compiler finds that memory by itself.

    In torch 2.11 an output that was written in place has no gradient in a compiled graph.
    """
    if torch.compiler.is_compiling():
        return torch.addmm(y, left, right, alpha=scale)
    return y.addmm_(left, right, alpha=scale)


def lora_linear(
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
) -> tuple[Tensor, Tensor]:
    """``m_out * (W xm + b + s B (g * drop(z)))`` and ``z = A xm`` with ``xm = m_in * x``."""
    dtype = x_TI.dtype
    xm_TI = x_TI if mask_in is None else x_TI * mask_in.to(dtype)
    z_TR = xm_TI @ a_RI.to(dtype).T
    y_TO = xm_TI @ weight_OI.T if bias is None else torch.addmm(bias.to(dtype), xm_TI, weight_OI.T)
    y_TO = onto(y_TO, _gated(z_TR, gate, dropout, seed), b_OR.to(dtype).T, scale)
    if mask_out is not None:
        y_TO = y_TO * mask_out.to(dtype) if torch.compiler.is_compiling() else y_TO.mul_(mask_out.to(dtype))
    return y_TO, z_TR


def lora_linear_backward(
    dy_TO: Tensor,
    x_TI: Tensor,
    z_TR: Tensor,
    weight_OI: Tensor,
    a_RI: Tensor,
    b_OR: Tensor,
    gate: Tensor | None,
    mask_in: Tensor | None,
    mask_out: Tensor | None,
    scale: float,
    dropout: float,
    seed: int,
    needs: Sequence[bool],
) -> tuple[Grad, Grad, Grad, Grad]:
    """Gradients of x, a, b and gate, each where `needs` asks for it."""
    needs_x, needs_a, needs_b, needs_gate = needs
    dtype = x_TI.dtype
    dy_TO = dy_TO if mask_out is None else dy_TO * mask_out.to(dtype)
    grad_x = grad_a = grad_b = grad_gate = None

    if needs_b:
        gated_TR = _gated(z_TR, gate, dropout, seed)
        # [R, T] @ [T, O] and a transpose: several times faster on CPU than [O, T] @ [T, R]
        grad_b = (gated_TR.T @ dy_TO).T.to(b_OR.dtype) * scale
    if needs_x or needs_a or needs_gate:
        dz_TR = (dy_TO @ b_OR.to(dtype)).mul_(scale)  # gradient of the gated product
        kept_TR = _dropout_scale(z_TR, dropout, seed) if dropout > 0.0 else None
        if needs_gate:
            assert gate is not None
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
    return grad_x, grad_a, grad_b, grad_gate


class MaskedLoraLinear(torch.autograd.Function):
    """`lora_linear` for autograd: nothing is saved but x and the rank-R product."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        x_TI, weight_OI, a_RI, b_OR, _, gate, mask_in, mask_out, *ctx.settings = args
        y_TO, z_TR = lora_linear(*args)
        ctx.save_for_backward(x_TI, z_TR, weight_OI, a_RI, b_OR, gate, mask_in, mask_out)
        return y_TO

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Grad, ...]:
        x, _, a, b, _, gate, *_ = ctx.needs_input_grad
        saved = (grads[0], *ctx.saved_tensors, *ctx.settings)
        grad_x, grad_a, grad_b, grad_gate = lora_linear_backward(*saved, (x, a, b, gate))  # type: ignore[call-arg]
        return grad_x, None, grad_a, grad_b, None, grad_gate, None, None, None, None, None
