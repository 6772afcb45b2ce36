"""Triton pass of the unit gate: the masked tensor and the column sums of its magnitudes in one read.

    y_TD = x_TD * mask_D        sums_D = sum_t valid_t |x_TD|

Forward runs it on h, backward on the upstream gradient; `column_sums` leaves out the store of y. Every program adds up
one slice of the tokens and writes one row of partial sums, which are reduced in a fixed order: no float atomics.

Sizes are run-time arguments in units of UNIT elements, so no new token count or pruned width compiles anew.

Dimension key: T tokens, D features, S slices of the tokens.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from apt_kernels import _triton
from apt_kernels._triton import contiguous, rows_contiguous
from apt_kernels.loads import load_tile, load_vector, store_tile

# BLOCK_T, BLOCK_D, warps. 16 x 128 is two 16-byte loads of bfloat16 a thread and does not spill (32 x 256 does); the
# other serves narrow tensors, where it would leave most columns idle.
CONFIGS = ((16, 128, 4), (64, 32, 4))
NARROW = 32  # features up to which the second is taken
WAVES = 8  # programs a multiprocessor: with 4 warps each, enough loads in flight to fill the memory's bandwidth

SIZES = ["T", "d_units", "x_units", "rows_each"]


@triton.jit
def own_slice(T, rows_each):
    """The first token of the program's slice, and the first after it."""
    slice_ = tl.program_id(1).to(tl.int64)
    return slice_ * rows_each, tl.minimum((slice_ + 1) * rows_each, T)


@triton.jit
def magnitude(x, valid_T, t, end):
    """``valid |x|``; where `valid_T` is None all tokens are."""
    size = tl.abs(x)
    if valid_T is not None:
        size *= load_vector(valid_T, t, end)[:, None]
    return size


@triton.jit
def store_sums(sums_SD, total, d, D):
    """Add up the rows of a tile into the program's row of partial sums."""
    tl.store(sums_SD + tl.program_id(1).to(tl.int64) * D + d, tl.sum(total, 0), mask=d < D)


@triton.jit(do_not_specialize=SIZES)
def gate_kernel(
    x_TD, mask_D, valid_T, y_TD, sums_SD, T, d_units, x_units, rows_each,
    UNIT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One slice of the tokens, BLOCK_D columns. No mask, no y; without `sums_SD` nothing is summed."""
    D = d_units * UNIT
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    first, end = own_slice(T, rows_each)
    if mask_D is not None:
        mask = load_vector(mask_D, d, D)
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for start in range(first, end, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        inside = (t[:, None] < end) & (d[None, :] < D)
        x = load_tile(x_TD, t, x_units * UNIT, d, inside)
        if mask_D is not None:
            store_tile(y_TD, t, D, d, x * mask[None, :], inside)
        if sums_SD is not None:
            total += magnitude(x, valid_T, t, end)
    if sums_SD is not None:
        store_sums(sums_SD, total, d, D)


class Cut(NamedTuple):
    """How a pass over ``[T, D]`` is divided: a function of shapes and device alone."""

    grid: tuple[int, int]  # blocks of columns, slices of the tokens
    rows_each: int  # tokens of a slice
    tile: dict[str, int]  # what a program takes at a time, and its warps

    def partial_sums(self, x_TD: Tensor) -> Tensor:
        """Memory for a row of sums a slice, in float32."""
        return x_TD.new_empty(self.grid[1], x_TD.shape[1], dtype=torch.float32)


def tile(config: tuple[int, int, int]) -> dict[str, int]:
    """The constants of a launch with one of `CONFIGS`."""
    block_t, block_d, warps = config
    return {"BLOCK_T": block_t, "BLOCK_D": block_d, "num_warps": warps}


def cut(x_TD: Tensor) -> Cut:
    """The tile by the width, and slices of the tokens that fill the device."""
    T, D = x_TD.shape
    config = CONFIGS[0] if D > NARROW else CONFIGS[1]
    block_t, block_d, _ = config
    blocks, columns = math.ceil(T / block_t), math.ceil(D / block_d)
    wanted = max(1, WAVES * _triton.programs(x_TD.device) // columns)
    rows_each = math.ceil(blocks / min(blocks, wanted)) * block_t
    return Cut((columns, math.ceil(T / rows_each)), rows_each, tile(config))


def added(sums_SD: Tensor | None) -> Tensor | None:
    """The partial sums of all slices together, in their order; None where nothing was collected."""
    return None if sums_SD is None else sums_SD.sum(0)


@_triton.on_own_device
def gate_pass(
    x_TD: Tensor, mask: Tensor | None, valid_T: Tensor | None, collect: bool
) -> tuple[Tensor | None, Tensor | None]:
    """``x * m`` in the dtype of x (None without a mask) and ``sum_t valid_t |x_t|`` in float32 (None unless asked)."""
    T, D = x_TD.shape
    y_TD = None if mask is None else x_TD.new_empty(T, D)
    if x_TD.numel() == 0:
        return y_TD, x_TD.new_zeros(D, dtype=torch.float32) if collect else None
    x_TD = rows_contiguous(x_TD)
    own = cut(x_TD)
    sums_SD = own.partial_sums(x_TD) if collect else None
    unit = _triton.unit(D, x_TD.stride(0))
    gate_kernel[own.grid](
        x_TD, contiguous(mask), None if valid_T is None else valid_T.float(), y_TD, sums_SD,
        T, D // unit, x_TD.stride(0) // unit, own.rows_each, UNIT=unit, **own.tile,
    )  # fmt: skip
    return y_TD, added(sums_SD)
