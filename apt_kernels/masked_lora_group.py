"""Adapted linear layers that share their input, by Triton kernels: one pass over x for all A, one for all their dA.

Dimension key: T tokens, I in, O out, R rank, P padded rank, of one layer or of all side by side.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from apt_kernels import _triton, tiles
from apt_kernels.masked_lora import back_onto, joint, onto
from apt_kernels.passes import Rows, down, down_backward, pack, packed_a, reduce, up_backward

PLAIN = Rows(None, 0.0, 0)


@_triton.on_own_device
def forward(
    implementation: str,
    x_TI: Tensor,
    weights: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    scale: float,
) -> list[Tensor]:
    """Every output ``[T, O_k]``, and last z ``[T, P]``."""
    a_PI = torch.cat([packed_a(a_RI, x_TI.dtype) for a_RI in a])
    z_TP, _ = down(x_TI, a_PI, a_PI.shape[0], PLAIN)
    product = onto if implementation == "split_cublas" else joint
    outputs = []
    for weight_OI, b_OR, bias, z_own in zip(weights, b, biases, columns(z_TP, a), strict=True):
        b_OP = pack(b_OR, weight_OI.shape[0], z_own.shape[1], x_TI.dtype, scale=scale)
        outputs.append(product(x_TI, weight_OI, z_own, b_OP, bias, None, None))
    return [*outputs, z_TP]


@_triton.on_own_device
def backward(
    dys: Sequence[Tensor],
    x_TI: Tensor,
    z_TP: Tensor,
    weights: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scale: float,
    needs_x: bool,
) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
    """Gradients of x where asked for, of every A, of every B."""
    ts_TP = torch.empty_like(z_TP)
    grads_b = []
    for dy_TO, b_OR, z_own, ts_own in zip(dys, b, columns(z_TP, a), columns(ts_TP, a), strict=True):
        b_OP = pack(b_OR, b_OR.shape[0], z_own.shape[1], x_TI.dtype, scale=scale)
        db_SOP, _ = up_backward(dy_TO, b_OP, z_own, ts_own, b_OR.shape[1], None, PLAIN, needs_gate=False)
        grads_b.append(reduce(db_SOP, b_OR.shape[0], b_OR.shape[1], b_OR.dtype, scale=scale))
    da_SPI = down_backward(x_TI, ts_TP)
    own_parts = da_SPI.split([tiles.padded_rank(len(a_RI)) for a_RI in a], dim=1)
    grads_a = [reduce(part, a_RI.shape[0], a_RI.shape[1], a_RI.dtype) for part, a_RI in zip(own_parts, a, strict=True)]
    if not needs_x:
        return None, grads_a, grads_b
    a_PI = torch.cat([packed_a(a_RI, x_TI.dtype) for a_RI in a])
    # One GEMM a layer, each onto what is there: the sum over layers costs no pass of its own.
    return back_onto(dys, weights, ts_TP, a_PI, None, [None] * len(dys)), grads_a, grads_b


def columns(wide_TP: Tensor, a: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The columns of each layer in a tensor of all."""
    return wide_TP.split([tiles.padded_rank(len(a_RI)) for a_RI in a], dim=1)
