"""Adapted linear layers that share their input, by Triton kernels: one pass over x for all A, one for all their dA.

Dimension key: T tokens, I in, O out, R rank, P padded rank, of one layer or of all side by side.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from apt_kernels import _triton, tiles
from apt_kernels.masked_lora import back_onto, joint, onto
from apt_kernels.operands import LoraOperands, ranks
from apt_kernels.passes import Rows, down, down_backward, pack, packed_a, reduce, up_backward

PLAIN = Rows(None, 0.0, 0)


@_triton.on_own_device
def forward(implementation: str, x_TI: Tensor, layers: Sequence[LoraOperands]) -> tuple[list[Tensor], Tensor]:
    """Every output ``[T, O_k]``, and z ``[T, P]``."""
    a_PI = _packed_a(layers, x_TI.dtype)
    z_TP, _ = down(x_TI, a_PI, a_PI.shape[0], PLAIN)
    product = onto if implementation == "split_cublas" else joint
    outputs = [
        product(x_TI, z_own, _packed_b(layer, x_TI.dtype), layer)
        for layer, z_own in zip(layers, _parts(z_TP, layers), strict=True)
    ]
    return outputs, z_TP


@_triton.on_own_device
def backward(
    dys: Sequence[Tensor], x_TI: Tensor, z_TP: Tensor, layers: Sequence[LoraOperands], needs_x: bool
) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
    """Gradients of x where asked for, of every A, of every B."""
    ts_TP = torch.empty_like(z_TP)
    grads_b = []
    for dy_TO, layer, z_own, ts_own in zip(dys, layers, _parts(z_TP, layers), _parts(ts_TP, layers), strict=True):
        O, R = layer.b.shape
        b_OP = _packed_b(layer, x_TI.dtype)
        db_SOP, _ = up_backward(dy_TO, b_OP, z_own, ts_own, R, None, PLAIN, needs_gate=False)
        grads_b.append(reduce(db_SOP, O, R, layer.b.dtype, scale=layer.scale))
    own_parts = _parts(down_backward(x_TI, ts_TP), layers)
    grads_a = [
        reduce(da_SPI, layer.a.shape[0], layer.a.shape[1], layer.a.dtype)
        for da_SPI, layer in zip(own_parts, layers, strict=True)
    ]
    if not needs_x:
        return None, grads_a, grads_b
    # One GEMM a layer, each onto what is there: the sum over layers costs no pass of its own.
    return back_onto(dys, ts_TP, _packed_a(layers, x_TI.dtype), layers), grads_a, grads_b


def _packed_a(layers: Sequence[LoraOperands], dtype: torch.dtype) -> Tensor:
    return torch.cat([packed_a(layer.a, dtype) for layer in layers])


def _packed_b(layer: LoraOperands, dtype: torch.dtype) -> Tensor:
    O, R = layer.b.shape
    return pack(layer.b, O, tiles.padded_rank(R), dtype, scale=layer.scale)


def _parts(wide: Tensor, layers: Sequence[LoraOperands]) -> tuple[Tensor, ...]:
    """The padded ranks of each layer, along axis 1 of a tensor of all."""
    return wide.split([tiles.padded_rank(rank) for rank in ranks(layers)], dim=1)
