"""The masked, adapted linear layer by Triton kernels: which products run, in which order.

Three implementations with one numerics contract: operands are in the dtype of x, sums in float32.

* ``split_cublas``: the low-rank product first, then the frozen product onto it (beta = 1) by torch's GEMM, which reads
  what it adds to while it computes.
* ``split_triton``: one GEMM whose inner range runs over the inputs and then over the rank; tensor descriptors on sm_90.
* ``one_kernel``: the same, the rank-R product made anew in every tile. For few outputs at a small rank; above
  rank 64 (16 in float32), and with factors per row, ``split_triton`` takes over.

Dimension key: T tokens, I in, O out, R rank, P rank padded to a multiple of 16.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from apt_kernels import _triton, products, tiles
from apt_kernels.passes import (
    Call,
    Rows,
    arithmetic,
    down,
    down_backward,
    launch_fitting,
    pack,
    packed_a,
    reduce,
    up_backward,
)


@_triton.on_own_device
def forward(
    implementation: str,
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
    """Output ``[T, O]`` and ``z = A (m_in * x)`` as ``[T, P]``, before gate and dropout: what backward needs."""
    R, O = a_RI.shape[0], weight_OI.shape[0]
    gate_R, rows = gates(gate, dropout, seed)
    b_OP = pack(b_OR, O, tiles.padded_rank(R), x_TI.dtype, scale=scale, col_by=gate_R)
    small = tiles.padded_rank(R) <= max(tiles.one_kernel_ranks(_triton.arch(x_TI.device), x_TI.dtype))
    if implementation == "one_kernel" and not rows.there and small:
        return _one_kernel(x_TI, weight_OI, packed_a(a_RI, x_TI.dtype, mask_in), b_OP, bias, mask_in, mask_out)
    z_TP, h_TP = down(x_TI, packed_a(a_RI, x_TI.dtype, mask_in), R, rows)
    if implementation == "split_cublas":
        return onto(x_TI, weight_OI, h_TP, b_OP, bias, mask_in, mask_out), z_TP
    return joint(x_TI, weight_OI, h_TP, b_OP, bias, mask_in, mask_out), z_TP


@_triton.on_own_device
def backward(
    implementation: str,
    dy_TO: Tensor,
    x_TI: Tensor,
    z_TP: Tensor,
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
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, a, b and gate, each where `needs` asks for it."""
    R, O = a_RI.shape[0], weight_OI.shape[0]
    needs_x, needs_a, needs_b, needs_gate = needs
    gate_R, rows = gates(gate, dropout, seed)
    ts_TP = torch.empty_like(z_TP)  # gradient of z: scale, gate, dropout and output mask are in it
    b_OP = pack(b_OR, O, tiles.padded_rank(R), dy_TO.dtype, scale=scale, row_by=mask_out)
    db_SOP, grad_gate = up_backward(dy_TO, b_OP, z_TP, ts_TP, R, gate_R, rows, needs_gate=needs_gate)
    grad_x = grad_a = grad_b = None
    if needs_b:
        grad_b = reduce(db_SOP, O, R, b_OR.dtype, scale=scale, row_by=mask_out, col_by=gate_R)
    del db_SOP
    if needs_a:
        grad_a = reduce(down_backward(x_TI, ts_TP), R, a_RI.shape[1], a_RI.dtype, col_by=mask_in)
    if needs_x:
        a_PI = packed_a(a_RI, dy_TO.dtype)
        if implementation == "split_cublas":
            grad_x = back_onto([dy_TO], [weight_OI], ts_TP, a_PI, mask_in, [mask_out])
        else:
            grad_x = _joint_backward(dy_TO, weight_OI, ts_TP, a_PI, mask_in, mask_out)
    return grad_x, grad_a, grad_b, grad_gate


def gates(gate: Tensor | None, dropout: float, seed: int) -> tuple[Tensor | None, Rows]:
    """A gate per rank, which the packed B takes, and what acts row by row."""
    gate = None if gate is None else gate.contiguous()
    per_row = gate is not None and gate.dim() == 2
    return (None if per_row else gate), Rows(gate if per_row else None, dropout, seed & 0x7FFFFFFF)


def onto(
    x_TI: Tensor, weight_OI: Tensor, h_TP: Tensor, b_OP: Tensor, bias: Tensor | None,
    mask_in: Tensor | None, mask_out: Tensor | None,
) -> Tensor:  # fmt: skip
    """``m_out * (h B^T + b + (m_in * x) W^T)``, the large product last and onto the small one."""
    dtype = x_TI.dtype
    y_TO = h_TP @ b_OP.T if bias is None else torch.addmm(bias.to(dtype), h_TP, b_OP.T)
    y_TO.addmm_(x_TI if mask_in is None else x_TI * mask_in.to(dtype), weight_OI.T)
    return y_TO if mask_out is None else y_TO.mul_(mask_out.to(dtype))


def back_onto(
    dys: Sequence[Tensor], weights: Sequence[Tensor], ts_TP: Tensor, a_PI: Tensor, mask_in: Tensor | None,
    masks_out: Sequence[Tensor | None],
) -> Tensor:  # fmt: skip
    """``m_in * (ts A + sum (m_out * dy) W)`` over layers that share the input."""
    dtype = ts_TP.dtype
    dx_TI = ts_TP @ a_PI[:, : weights[0].shape[1]]
    for dy_TO, weight_OI, mask_out in zip(dys, weights, masks_out, strict=True):
        dx_TI.addmm_(dy_TO if mask_out is None else dy_TO * mask_out.to(dtype), weight_OI)
    return dx_TI if mask_in is None else dx_TI.mul_(mask_in.to(dtype))


def joint(
    x_TI: Tensor, weight_OI: Tensor, h_TP: Tensor, b_OP: Tensor, bias: Tensor | None,
    mask_in: Tensor | None, mask_out: Tensor | None,
) -> Tensor:  # fmt: skip
    """The same in one GEMM: the inner range runs over the inputs, then over the rank."""
    (T, I), (O, P) = x_TI.shape, b_OP.shape
    y_TO = x_TI.new_empty(T, O)
    unit = _triton.unit(I, O, x_TI.stride(0), weight_OI.stride(0))
    device, size = x_TI.device, _triton.programs(x_TI.device)
    if mask_in is None and described(unit, x_TI, weight_OI, h_TP, b_OP, y_TO):

        def described_call(tile: tiles.Tiles) -> Call:
            return (min(size, triton.cdiv(T, tile.BM) * triton.cdiv(O, tile.BN)),), (
                TensorDescriptor.from_tensor(x_TI, [tile.BM, tile.BK]),
                TensorDescriptor.from_tensor(weight_OI, [tile.BN, tile.BK]),
                TensorDescriptor.from_tensor(h_TP, [tile.BM, tiles.TMA_RANK]),
                TensorDescriptor.from_tensor(b_OP, [tile.BN, tiles.TMA_RANK]),
                bias, mask_out, TensorDescriptor.from_tensor(y_TO, [tile.BM, tile.BN // 2]), T, I // 8, O // 8, P // 16,
                size,
            )  # fmt: skip

        launch_fitting(
            products.forward_tma, tiles.PRODUCT_TMA, (T, O), device, described_call,
            BIAS=bias is not None, MASK_OUT=mask_out is not None, BP=tiles.TMA_RANK, GROUP=tiles.GROUP,
        )  # fmt: skip
        return y_TO
    launch_fitting(
        products.forward, tiles.product(_triton.arch(device), x_TI.dtype, unit), (T, O), device,
        one_program_a_tile(
            T, O, x_TI, weight_OI, h_TP, b_OP, bias, mask_in, mask_out, y_TO, T, I // unit, O // unit, P // 16,
            x_TI.stride(0) // unit, weight_OI.stride(0) // unit, h_TP.stride(0) // 16,
        ),
        BIAS=bias is not None, MASK_IN=mask_in is not None, MASK_OUT=mask_out is not None, UNIT=unit,
        **arithmetic(x_TI.dtype), GROUP=tiles.GROUP,
    )  # fmt: skip
    return y_TO


def one_program_a_tile(rows: int, cols: int, *args: Any) -> Callable[[tiles.Tiles], Call]:
    """The call of a kernel whose arguments do not depend on its tiles."""
    return lambda tile: ((triton.cdiv(rows, tile.BM) * triton.cdiv(cols, tile.BN),), args)


def _one_kernel(
    x_TI: Tensor, weight_OI: Tensor, a_PI: Tensor, b_OP: Tensor, bias: Tensor | None,
    mask_in: Tensor | None, mask_out: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    (T, I), (O, P) = x_TI.shape, b_OP.shape
    y_TO, z_TP = x_TI.new_empty(T, O), x_TI.new_empty(T, P)
    if not O:
        return y_TO, z_TP.zero_()
    unit = _triton.unit(I, O, x_TI.stride(0), weight_OI.stride(0))
    launch_fitting(
        products.one_kernel, tiles.product(_triton.arch(x_TI.device), x_TI.dtype, unit), (T, O), x_TI.device,
        one_program_a_tile(
            T, O, x_TI, weight_OI, a_PI, b_OP, bias, mask_in, mask_out, y_TO, z_TP, T, I // unit, O // unit, P // 16,
            x_TI.stride(0) // unit, weight_OI.stride(0) // unit, a_PI.stride(0) // 8,
        ),
        BIAS=bias is not None, MASK_IN=mask_in is not None, MASK_OUT=mask_out is not None, UNIT=unit,
        ranks=tiles.one_kernel_ranks(_triton.arch(x_TI.device), x_TI.dtype),
        **arithmetic(x_TI.dtype), BR=tiles.rank_block(P), GROUP=tiles.GROUP,
    )  # fmt: skip
    return y_TO, z_TP


def _joint_backward(
    dy_TO: Tensor, weight_OI: Tensor, ts_TP: Tensor, a_PI: Tensor, mask_in: Tensor | None, mask_out: Tensor | None
) -> Tensor:
    """``m_in * ([m_out * dy | ts] [W ; A])`` in one GEMM."""
    (T, O), (P, I) = dy_TO.shape, (ts_TP.shape[1], weight_OI.shape[1])
    dx_TI = dy_TO.new_empty(T, I)
    unit = _triton.unit(I, O, dy_TO.stride(0), weight_OI.stride(0))
    device, size = dy_TO.device, _triton.programs(dy_TO.device)
    if mask_out is None and described(unit, dy_TO, weight_OI, ts_TP, a_PI, dx_TI):

        def described_call(tile: tiles.Tiles) -> Call:
            return (min(size, triton.cdiv(T, tile.BM) * triton.cdiv(I, tile.BN)),), (
                TensorDescriptor.from_tensor(dy_TO, [tile.BM, tile.BK]),
                TensorDescriptor.from_tensor(weight_OI, [tile.BK, tile.BN]),
                TensorDescriptor.from_tensor(ts_TP, [tile.BM, tiles.TMA_RANK]),
                TensorDescriptor.from_tensor(a_PI, [tiles.TMA_RANK, tile.BN]),
                mask_in, TensorDescriptor.from_tensor(dx_TI, [tile.BM, tile.BN // 2]), T, I // 8, O // 8, P // 16, size,
            )  # fmt: skip

        launch_fitting(
            products.backward_tma, tiles.PRODUCT_TMA, (T, I), device, described_call,
            MASK_IN=mask_in is not None, BP=tiles.TMA_RANK, GROUP=tiles.GROUP,
        )  # fmt: skip
        return dx_TI
    launch_fitting(
        products.backward, tiles.product(_triton.arch(device), dy_TO.dtype, unit), (T, I), device,
        one_program_a_tile(
            T, I, dy_TO, weight_OI, ts_TP, a_PI, mask_in, mask_out, dx_TI, T, I // unit, O // unit, P // 16,
            dy_TO.stride(0) // unit, weight_OI.stride(0) // unit, a_PI.stride(0) // 8,
        ),
        MASK_IN=mask_in is not None, MASK_OUT=mask_out is not None, UNIT=unit, **arithmetic(dy_TO.dtype),
        GROUP=tiles.GROUP,
    )  # fmt: skip
    return dx_TI


def described(unit: int, *operands: Tensor) -> bool:
    """Whether these operands can be loaded by host-made descriptors: sm_90, 16-bit, rows and base at 16 bytes."""
    device, dtype = operands[0].device, operands[0].dtype
    return (
        _triton.arch(device) == "sm_90"
        and dtype in (torch.float16, torch.bfloat16)
        and unit == 8
        and all(operand.data_ptr() % 16 == 0 and operand.numel() > 0 for operand in operands)
    )
