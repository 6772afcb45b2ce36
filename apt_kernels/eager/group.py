"""Adapted linear layers that share their input: one rank-R product and one gradient of A for all of them.

Dimension key: T tokens, I in, O out, R ranks of all layers side by side.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from apt_kernels.autocast import outside_autocast
from apt_kernels.eager.linear import frozen_product, onto
from apt_kernels.operands import Grad, LoraOperands, layers_of, ranks, save_group, saved_group


@outside_autocast
def lora_linears(x_TI: Tensor, layers: Sequence[LoraOperands]) -> tuple[list[Tensor], Tensor]:
    """``y_k = W_k x + b_k + s B_k A_k x`` for every layer, and ``z = [A_1; A_2; ..] x`` for backward."""
    dtype = x_TI.dtype
    z_TR = x_TI @ torch.cat([layer.a.to(dtype) for layer in layers]).T
    outputs = []
    for layer, own_TR in zip(layers, z_TR.split(ranks(layers), dim=1), strict=True):
        y_TO = frozen_product(x_TI, layer)
        if layer.b.shape[1]:
            y_TO = onto(y_TO, own_TR, layer.b.to(dtype).T, layer.scale)
        outputs.append(y_TO)
    return outputs, z_TR


@outside_autocast
def lora_linears_backward(
    dys: Sequence[Tensor], x_TI: Tensor, z_TR: Tensor, layers: Sequence[LoraOperands], needs_x: bool
) -> tuple[Grad, list[Tensor], list[Tensor]]:
    """Gradients of x (where asked for), of every A and of every B."""
    dtype = x_TI.dtype
    scale = layers[0].scale
    dz_TR = torch.cat([dy_TO @ layer.b.to(dtype) for dy_TO, layer in zip(dys, layers, strict=True)], dim=1).mul_(scale)
    grads_b = [
        # [R, T] @ [T, O] and a transpose: several times faster on CPU than [O, T] @ [T, R]
        (own_TR.T @ dy_TO).T.to(layer.b.dtype) * scale
        for dy_TO, layer, own_TR in zip(dys, layers, z_TR.split(ranks(layers), dim=1), strict=True)
    ]
    own_parts = (dz_TR.T @ x_TI).split(ranks(layers))
    grads_a = [da_RI.to(layer.a.dtype) for da_RI, layer in zip(own_parts, layers, strict=True)]
    if not needs_x:
        return None, grads_a, grads_b
    grad_x = dz_TR @ torch.cat([layer.a.to(dtype) for layer in layers])
    for dy_TO, layer in zip(dys, layers, strict=True):
        grad_x.addmm_(dy_TO, layer.weight)
    return grad_x, grads_a, grads_b


class LoraLinears(torch.autograd.Function):
    """`lora_linears` for autograd; tensors come flat: x, then weights, A's, B's and biases of all layers."""

    @staticmethod
    def forward(ctx: Any, scale: float, x_TI: Tensor, *flat: Any) -> tuple[Tensor, ...]:
        count = len(flat) // 4
        weights, a, b, biases = (flat[part * count : (part + 1) * count] for part in range(4))
        layers = layers_of(weights, a, b, biases, scale)
        outputs, z_TR = lora_linears(x_TI, layers)
        save_group(ctx, x_TI, z_TR, layers)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *dys: Any) -> tuple[Grad, ...]:
        grad_x, grads_a, grads_b = lora_linears_backward(dys, *saved_group(ctx), ctx.needs_input_grad[1])
        frozen = [None] * len(dys)  # weights, and biases
        return None, grad_x, *frozen, *grads_a, *grads_b, *frozen
