"""The masked, adapted linear layer: saves x and the rank-R product only, computes just the gradients asked for.

Dimension key: T tokens, I in, O out, R rank.
"""

from typing import Any

import torch
from torch import Tensor

from apt_kernels.autocast import outside_autocast
from apt_kernels.operands import Grad, LoraGrads, LoraNeeds, LoraOperands, save, saved

INPUTS = ("x", *LoraOperands._fields)  # of `MaskedLoraLinear`


def _dropout_scale(z_TR: Tensor, p: float, seed: int) -> Tensor:
    """0 where dropped, 1 / (1 - p) elsewhere: drawn from the seed, so backward draws it again and saves nothing."""
    generator = torch.Generator(z_TR.device).manual_seed(seed)
    keep_TR = torch.rand(z_TR.shape, generator=generator, device=z_TR.device) >= p
    return keep_TR.to(z_TR.dtype) / (1.0 - p)


def _gated(z_TR: Tensor, layer: LoraOperands) -> Tensor:
    if layer.dropout > 0.0:
        z_TR = z_TR * _dropout_scale(z_TR, layer.dropout, layer.seed)
    return z_TR if layer.gate is None else z_TR * layer.gate.to(z_TR.dtype)


def onto(y: Tensor, left: Tensor, right: Tensor, scale: float) -> Tensor:
    """``y + scale * left @ right``, in the memory of y; a compiler finds that memory by itself.

    In torch 2.11 an output that was written in place has no gradient in a compiled graph.
    """
    if torch.compiler.is_compiling():
        return torch.addmm(y, left, right, alpha=scale)
    return y.addmm_(left, right, alpha=scale)


def frozen_product(x_TI: Tensor, layer: LoraOperands) -> Tensor:
    """``W x + b``."""
    if layer.bias is None:
        return x_TI @ layer.weight.T
    return torch.addmm(layer.bias.to(x_TI.dtype), x_TI, layer.weight.T)


@outside_autocast
def lora_linear(x_TI: Tensor, layer: LoraOperands) -> tuple[Tensor, Tensor]:
    """``m_out * (W xm + b + s B (g * drop(z)))`` and ``z = A xm`` with ``xm = m_in * x``."""
    dtype = x_TI.dtype
    xm_TI = x_TI if layer.mask_in is None else x_TI * layer.mask_in.to(dtype)
    z_TR = xm_TI @ layer.a.to(dtype).T
    y_TO = onto(frozen_product(xm_TI, layer), _gated(z_TR, layer), layer.b.to(dtype).T, layer.scale)
    if layer.mask_out is not None:
        mask_out = layer.mask_out.to(dtype)
        y_TO = y_TO * mask_out if torch.compiler.is_compiling() else y_TO.mul_(mask_out)
    return y_TO, z_TR


@outside_autocast
def lora_linear_backward(dy_TO: Tensor, x_TI: Tensor, z_TR: Tensor, layer: LoraOperands, needs: LoraNeeds) -> LoraGrads:
    """The gradients that `needs` asks for; z of forward, without padding."""
    gate, mask_in = layer.gate, layer.mask_in
    dtype = x_TI.dtype
    dy_TO = dy_TO if layer.mask_out is None else dy_TO * layer.mask_out.to(dtype)
    grad_x = grad_a = grad_b = grad_gate = None

    if needs.b:
        # [R, T] @ [T, O] and a transpose: several times faster on CPU than [O, T] @ [T, R]
        grad_b = (_gated(z_TR, layer).T @ dy_TO).T.to(layer.b.dtype) * layer.scale
    if needs.x or needs.a or needs.gate:
        dz_TR = (dy_TO @ layer.b.to(dtype)).mul_(layer.scale)  # gradient of the gated product
        kept_TR = _dropout_scale(z_TR, layer.dropout, layer.seed) if layer.dropout > 0.0 else None
        if needs.gate:
            assert gate is not None
            rows_TR = dz_TR * (z_TR if kept_TR is None else z_TR * kept_TR)
            grad_gate = (rows_TR.sum(0) if gate.dim() == 1 else rows_TR).to(gate.dtype)
        if gate is not None:
            dz_TR = dz_TR * gate.to(dtype)
        if kept_TR is not None:
            dz_TR = dz_TR * kept_TR
        if needs.a:
            grad_a = (dz_TR.T @ x_TI).to(layer.a.dtype)
            grad_a = grad_a if mask_in is None else grad_a.mul_(mask_in.to(layer.a.dtype))
        if needs.x:
            grad_x = dy_TO @ layer.weight
            grad_x.addmm_(dz_TR, layer.a.to(dtype))
            grad_x = grad_x if mask_in is None else grad_x.mul_(mask_in.to(dtype))
    return LoraGrads(grad_x, grad_a, grad_b, grad_gate)


class MaskedLoraLinear(torch.autograd.Function):
    """`lora_linear` for autograd: nothing is saved but x and the rank-R product."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, *operands: Any) -> Tensor:
        layer = LoraOperands(*operands)
        y_TO, z_TR = lora_linear(x_TI, layer)
        save(ctx, x_TI, z_TR, layer)
        return y_TO

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Grad, ...]:
        return lora_linear_backward(grads[0], *saved(ctx)).at(INPUTS)
