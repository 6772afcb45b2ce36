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
from apt_kernels.operands import LoraGrads, LoraNeeds, LoraOperands
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
def forward(implementation: str, x_TI: Tensor, layer: LoraOperands) -> tuple[Tensor, Tensor]:
    """Output ``[T, O]`` and ``z = A (m_in * x)`` as ``[T, P]``, before gate and dropout: what backward needs."""
    R, dtype = layer.a.shape[0], x_TI.dtype
    P = tiles.padded_rank(R)
    gate_R, rows = gates(layer)
    b_OP = pack(layer.b, layer.weight.shape[0], P, dtype, scale=layer.scale, col_by=gate_R)
    a_PI = packed_a(layer.a, dtype, layer.mask_in)
    largest = max(tiles.one_kernel_ranks(_triton.arch(x_TI.device), dtype))
    if implementation == "one_kernel" and not rows.there and largest >= P:
        return _one_kernel(x_TI, a_PI, b_OP, layer)
    z_TP, h_TP = down(x_TI, a_PI, R, rows)
    product = onto if implementation == "split_cublas" else joint
    return product(x_TI, h_TP, b_OP, layer), z_TP


@_triton.on_own_device
def backward(
    implementation: str, dy_TO: Tensor, x_TI: Tensor, z_TP: Tensor, layer: LoraOperands, needs: LoraNeeds
) -> LoraGrads:
    """The gradients that `needs` asks for."""
    R, I = layer.a.shape
    O = layer.weight.shape[0]
    gate_R, rows = gates(layer)
    ts_TP = torch.empty_like(z_TP)  # gradient of z: scale, gate, dropout and output mask are in it
    b_OP = pack(layer.b, O, tiles.padded_rank(R), dy_TO.dtype, scale=layer.scale, row_by=layer.mask_out)
    db_SOP, grad_gate = up_backward(dy_TO, b_OP, z_TP, ts_TP, R, gate_R, rows, needs_gate=needs.gate)
    grad_x = grad_a = grad_b = None
    if needs.b:
        grad_b = reduce(db_SOP, O, R, layer.b.dtype, scale=layer.scale, row_by=layer.mask_out, col_by=gate_R)
    del db_SOP
    if needs.a:
        grad_a = reduce(down_backward(x_TI, ts_TP), R, I, layer.a.dtype, col_by=layer.mask_in)
    if needs.x:
        a_PI = packed_a(layer.a, dy_TO.dtype)
        if implementation == "split_cublas":
            grad_x = back_onto([dy_TO], ts_TP, a_PI, [layer])
        else:
            grad_x = _joint_backward(dy_TO, ts_TP, a_PI, layer)
    return LoraGrads(grad_x, grad_a, grad_b, grad_gate)


def gates(layer: LoraOperands) -> tuple[Tensor | None, Rows]:
    """A gate per rank, which the packed B takes, and what acts row by row."""
    gate = _triton.contiguous(layer.gate)
    seed = layer.seed & 0x7FFFFFFF
    if gate is None or gate.dim() == 1:
        return gate, Rows(None, layer.dropout, seed)
    return None, Rows(gate, layer.dropout, seed)


def onto(x_TI: Tensor, h_TP: Tensor, b_OP: Tensor, layer: LoraOperands) -> Tensor:
    """``m_out * (h B^T + b + (m_in * x) W^T)``, the large product last and onto the small one."""
    bias, mask_in, mask_out = layer.bias, layer.mask_in, layer.mask_out
    dtype = x_TI.dtype
    y_TO = h_TP @ b_OP.T if bias is None else torch.addmm(bias.to(dtype), h_TP, b_OP.T)
    y_TO.addmm_(x_TI if mask_in is None else x_TI * mask_in.to(dtype), layer.weight.T)
    return y_TO if mask_out is None else y_TO.mul_(mask_out.to(dtype))


def back_onto(dys: Sequence[Tensor], ts_TP: Tensor, a_PI: Tensor, layers: Sequence[LoraOperands]) -> Tensor:
    """``m_in * (ts A + sum (m_out * dy) W)`` over layers that share the input and its mask."""
    dtype = ts_TP.dtype
    mask_in = layers[0].mask_in
    dx_TI = ts_TP @ a_PI[:, : layers[0].weight.shape[1]]
    for dy_TO, layer in zip(dys, layers, strict=True):
        dx_TI.addmm_(dy_TO if layer.mask_out is None else dy_TO * layer.mask_out.to(dtype), layer.weight)
    return dx_TI if mask_in is None else dx_TI.mul_(mask_in.to(dtype))


def joint(x_TI: Tensor, h_TP: Tensor, b_OP: Tensor, layer: LoraOperands) -> Tensor:
    """The same in one GEMM: the inner range runs over the inputs, then over the rank."""
    (T, I), (O, P) = x_TI.shape, b_OP.shape
    weight_OI, bias, mask_in, mask_out = layer.weight, layer.bias, layer.mask_in, layer.mask_out
    y_TO = x_TI.new_empty(T, O)
    unit = _triton.unit(I, O, x_TI.stride(0), weight_OI.stride(0))
    if mask_in is None and described(unit, x_TI, weight_OI, h_TP, b_OP, y_TO):

        def operands(tile: tiles.Tiles) -> tuple[Any, ...]:
            return (
                described_by(x_TI, tile.BM, tile.BK), described_by(weight_OI, tile.BN, tile.BK),
                described_by(h_TP, tile.BM, tiles.TMA_RANK), described_by(b_OP, tile.BN, tiles.TMA_RANK),
                bias, mask_out, described_by(y_TO, tile.BM, tile.BN // 2), T, I // 8, O // 8, P // 16,
            )  # fmt: skip

        flags = {"BIAS": bias is not None, "MASK_OUT": mask_out is not None}
        return launch_persistent(products.forward_tma, y_TO, operands, **flags)
    return launch_by_tile(
        products.forward, y_TO, unit, x_TI, weight_OI, h_TP, b_OP, bias, mask_in, mask_out, y_TO,
        T, I // unit, O // unit, P // 16, x_TI.stride(0) // unit, weight_OI.stride(0) // unit, h_TP.stride(0) // 16,
        BIAS=bias is not None, MASK_IN=mask_in is not None, MASK_OUT=mask_out is not None,
    )  # fmt: skip


def _one_kernel(x_TI: Tensor, a_PI: Tensor, b_OP: Tensor, layer: LoraOperands) -> tuple[Tensor, Tensor]:
    (T, I), (O, P) = x_TI.shape, b_OP.shape
    weight_OI, bias, mask_in, mask_out = layer.weight, layer.bias, layer.mask_in, layer.mask_out
    y_TO, z_TP = x_TI.new_empty(T, O), x_TI.new_empty(T, P)
    if not O:
        return y_TO, z_TP.zero_()
    unit = _triton.unit(I, O, x_TI.stride(0), weight_OI.stride(0))
    launch_by_tile(
        products.one_kernel, y_TO, unit, x_TI, weight_OI, a_PI, b_OP, bias, mask_in, mask_out, y_TO, z_TP,
        T, I // unit, O // unit, P // 16, x_TI.stride(0) // unit, weight_OI.stride(0) // unit, a_PI.stride(0) // 8,
        BIAS=bias is not None, MASK_IN=mask_in is not None, MASK_OUT=mask_out is not None, BR=tiles.rank_block(P),
        ranks=tiles.one_kernel_ranks(_triton.arch(x_TI.device), x_TI.dtype),
    )  # fmt: skip
    return y_TO, z_TP


def _joint_backward(dy_TO: Tensor, ts_TP: Tensor, a_PI: Tensor, layer: LoraOperands) -> Tensor:
    """``m_in * ([m_out * dy | ts] [W ; A])`` in one GEMM."""
    (T, O), (P, I) = dy_TO.shape, (ts_TP.shape[1], layer.weight.shape[1])
    weight_OI, mask_in, mask_out = layer.weight, layer.mask_in, layer.mask_out
    dx_TI = dy_TO.new_empty(T, I)
    unit = _triton.unit(I, O, dy_TO.stride(0), weight_OI.stride(0))
    if mask_out is None and described(unit, dy_TO, weight_OI, ts_TP, a_PI, dx_TI):

        def operands(tile: tiles.Tiles) -> tuple[Any, ...]:
            return (
                described_by(dy_TO, tile.BM, tile.BK), described_by(weight_OI, tile.BK, tile.BN),
                described_by(ts_TP, tile.BM, tiles.TMA_RANK), described_by(a_PI, tiles.TMA_RANK, tile.BN),
                mask_in, described_by(dx_TI, tile.BM, tile.BN // 2), T, I // 8, O // 8, P // 16,
            )  # fmt: skip

        return launch_persistent(products.backward_tma, dx_TI, operands, MASK_IN=mask_in is not None)
    return launch_by_tile(
        products.backward, dx_TI, unit, dy_TO, weight_OI, ts_TP, a_PI, mask_in, mask_out, dx_TI,
        T, I // unit, O // unit, P // 16, dy_TO.stride(0) // unit, weight_OI.stride(0) // unit, a_PI.stride(0) // 8,
        MASK_IN=mask_in is not None, MASK_OUT=mask_out is not None,
    )  # fmt: skip


def launch_by_tile(kernel: Any, target: Tensor, unit: int, *args: Any, **meta: Any) -> Tensor:
    """Launch a program a tile of the target, which is returned; operands go by pointers."""
    choices = tiles.product(_triton.arch(target.device), target.dtype, unit)

    def call(tile: tiles.Tiles) -> Call:
        return (num_tiles(target, tile),), args

    constants = {"UNIT": unit, "GROUP": tiles.GROUP, **arithmetic(target.dtype), **meta}
    launch_fitting(kernel, choices, target, call, **constants)
    return target


def launch_persistent(
    kernel: Any, target: Tensor, operands: Callable[[tiles.Tiles], tuple[Any, ...]], **meta: Any
) -> Tensor:
    """Launch at most a program a multiprocessor, which walks over tiles of the target; operands by descriptors."""
    programs = _triton.programs(target.device)

    def call(tile: tiles.Tiles) -> Call:
        return (min(programs, num_tiles(target, tile)),), (*operands(tile), programs)

    launch_fitting(kernel, tiles.PRODUCT_TMA, target, call, BP=tiles.TMA_RANK, GROUP=tiles.GROUP, **meta)
    return target


def num_tiles(target: Tensor, tile: tiles.Tiles) -> int:
    """How many tiles cover the target."""
    rows, cols = target.shape
    return triton.cdiv(rows, tile.BM) * triton.cdiv(cols, tile.BN)


def described_by(tensor: Tensor, *block: int) -> TensorDescriptor:
    """The tensor as the persistent kernels load it, a block at a time."""
    return TensorDescriptor.from_tensor(tensor, list(block))


def described(unit: int, *operands: Tensor) -> bool:
    """Whether these operands can be loaded by host-made descriptors: sm_90, 16-bit, rows and base at 16 bytes."""
    device, dtype = operands[0].device, operands[0].dtype
    return (
        _triton.arch(device) == "sm_90"
        and dtype in (torch.float16, torch.bfloat16)
        and unit == 8
        and all(describable(operand) for operand in operands)
    )


def describable(operand: Tensor) -> bool:
    """Whether it begins at 16 bytes and its rows do not overlap, as those of an expanded gradient do (stride 0)."""
    return operand.data_ptr() % 16 == 0 and operand.numel() > 0 and operand.stride(0) >= operand.shape[1]
