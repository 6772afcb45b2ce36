"""Adapted linear layers that share their input: one rank-R product and one gradient of A for all of them.

Dimension key: T tokens, I in, O out, R ranks of all layers side by side.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from apt_kernels.eager.linear import onto

Grad = Tensor | None


def _columns(a: Sequence[Tensor]) -> list[slice]:
    """Where each layer's rank stands in the common product."""
    ends = [0]
    for a_RI in a:
        ends.append(ends[-1] + a_RI.shape[0])
    return [slice(start, end) for start, end in pairwise(ends)]


def lora_linears(
    x_TI: Tensor,
    weights: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    scale: float,
) -> tuple[list[Tensor], Tensor]:
    """``y_k = W_k x + b_k + s B_k A_k x`` for every layer, and ``z = [A_1; A_2; ..] x`` for backward."""
    dtype = x_TI.dtype
    z_TR = x_TI @ torch.cat([a_RI.to(dtype) for a_RI in a]).T
    outputs = []
    for weight_OI, b_OR, bias, own in zip(weights, b, biases, _columns(a), strict=True):
        y_TO = x_TI @ weight_OI.T if bias is None else torch.addmm(bias.to(dtype), x_TI, weight_OI.T)
        if b_OR.shape[1]:
            y_TO = onto(y_TO, z_TR[:, own], b_OR.to(dtype).T, scale)
        outputs.append(y_TO)
    return outputs, z_TR


def lora_linears_backward(
    dys: Sequence[Tensor],
    x_TI: Tensor,
    z_TR: Tensor,
    weights: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scale: float,
    needs_x: bool,
) -> tuple[Grad, list[Tensor], list[Tensor]]:
    """Gradients of x (where asked for), of every A and of every B."""
    dtype = x_TI.dtype
    dz_TR = torch.cat([dy_TO @ b_OR.to(dtype) for dy_TO, b_OR in zip(dys, b, strict=True)], dim=1).mul_(scale)
    grads_b = [
        # [R, T] @ [T, O] and a transpose: several times faster on CPU than [O, T] @ [T, R]
        (z_TR[:, own].T @ dy_TO).T.to(b_OR.dtype) * scale
        for dy_TO, b_OR, own in zip(dys, b, _columns(a), strict=True)
    ]
    da_RI = dz_TR.T @ x_TI
    grads_a = [da_RI[own].to(a_RI.dtype) for own, a_RI in zip(_columns(a), a, strict=True)]
    if not needs_x:
        return None, grads_a, grads_b
    grad_x = dz_TR @ torch.cat([a_RI.to(dtype) for a_RI in a])
    for dy_TO, weight_OI in zip(dys, weights, strict=True):
        grad_x.addmm_(dy_TO, weight_OI)
    return grad_x, grads_a, grads_b


class LoraLinears(torch.autograd.Function):
    """`lora_linears` for autograd; tensors come flat: x, then weights, A's, B's and biases of all layers."""

    @staticmethod
    def forward(ctx: Any, scale: float, x_TI: Tensor, *flat: Tensor | None) -> tuple[Tensor, ...]:
        weights, a, b, biases = layers_of(flat)
        outputs, z_TR = lora_linears(x_TI, weights, a, b, biases, scale)
        ctx.save_for_backward(x_TI, z_TR, *weights, *a, *b)
        ctx.scale = scale
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *dys: Any) -> tuple[Grad, ...]:
        x_TI, z_TR, *flat = ctx.saved_tensors
        count = len(flat) // 3
        weights, a, b = flat[:count], flat[count : 2 * count], flat[2 * count :]
        needs_x = ctx.needs_input_grad[1]
        grad_x, grads_a, grads_b = lora_linears_backward(dys, x_TI, z_TR, weights, a, b, ctx.scale, needs_x)
        return None, grad_x, *[None] * count, *grads_a, *grads_b, *[None] * count


def layers_of(flat: Sequence[Any]) -> tuple[Any, ...]:
    """Four lists, one entry a layer, out of one flat list of them."""
    count = len(flat) // 4
    return tuple(flat[part * count : (part + 1) * count] for part in range(4))
