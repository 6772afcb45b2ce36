"""Triton pass of the unit gate: the masked tensor and the column sums of its magnitudes in one read.

    y_TD = x_TD * mask_D        sums_D = sum_t valid_t |x_TD|

Forward runs it on h, backward on the upstream gradient; `column_sums` leaves out the store of y. Every program adds up
one slice of the tokens and writes one row of partial sums, which are reduced in a fixed order: no float atomics.

Sizes are run-time arguments in units of UNIT elements, so no new token count or pruned width compiles anew.

Dimension key: T tokens, D features, S slices of the tokens.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from apt_kernels import _triton

# BLOCK_T, BLOCK_D, warps. 16 x 128 is two 16-byte loads of bfloat16 a thread and does not spill (32 x 256 does); the
# other serves narrow tensors, where it would leave most columns idle.
CONFIGS = ((16, 128, 4), (64, 32, 4))
NARROW = 32  # features up to which the second is taken
WAVES = 8  # programs a multiprocessor: with 4 warps each, enough loads in flight to fill the memory's bandwidth

SIZES = ["T", "d_units", "x_units", "rows_each"]


@triton.jit(do_not_specialize=SIZES)
def gate_kernel(
    x_TD, mask_D, valid_T, y_TD, sums_SD, T, d_units, x_units, rows_each,
    UNIT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One slice of the tokens, BLOCK_D columns. No mask, no y; without `sums_SD` nothing is summed."""
    D, stride = d_units * UNIT, x_units * UNIT
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    slice_ = tl.program_id(1).to(tl.int64)
    end = tl.minimum((slice_ + 1) * rows_each, T)
    if mask_D is not None:
        mask = tl.load(mask_D + d, mask=d < D, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for start in range(slice_ * rows_each, end, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        inside = (t[:, None] < end) & (d[None, :] < D)
        x = tl.load(x_TD + t[:, None] * stride + d[None, :], mask=inside, other=0.0).to(tl.float32)
        if mask_D is not None:
            y = x * mask[None, :]
            tl.store(y_TD + t[:, None] * D + d[None, :], y.to(y_TD.dtype.element_ty), mask=inside)
        if sums_SD is not None:
            size = tl.abs(x)
            if valid_T is not None:
                size *= tl.load(valid_T + t, mask=t < end, other=0.0)[:, None]
            total += size
    if sums_SD is not None:
        tl.store(sums_SD + slice_ * D + d, tl.sum(total, 0), mask=d < D)


def config(D: int) -> tuple[int, int, int]:
    """BLOCK_T, BLOCK_D and warps of a pass over ``[T, D]``."""
    return CONFIGS[0] if D > NARROW else CONFIGS[1]


def slices(T: int, D: int, device: torch.device) -> tuple[int, int]:
    """How many slices the tokens are cut into, and the rows of each: a function of shapes and device alone."""
    block_t, block_d, _ = config(D)
    blocks = math.ceil(T / block_t)
    wanted = max(1, WAVES * _triton.programs(device) // math.ceil(D / block_d))
    rows_each = math.ceil(blocks / min(blocks, wanted)) * block_t
    return math.ceil(T / rows_each), rows_each


def rows(x_TD: Tensor) -> Tensor:
    """The tensor itself where its rows are contiguous, whatever lies between them; else a copy."""
    return x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()


@_triton.on_own_device
def gate_pass(
    x_TD: Tensor, mask: Tensor | None, valid_T: Tensor | None, collect: bool
) -> tuple[Tensor | None, Tensor | None]:
    """``x * m`` in the dtype of x (None without a mask) and ``sum_t valid_t |x_t|`` in float32 (None unless asked)."""
    T, D = x_TD.shape
    y_TD = None if mask is None else x_TD.new_empty(T, D)
    if x_TD.numel() == 0:
        return y_TD, x_TD.new_zeros(D, dtype=torch.float32) if collect else None
    x_TD = rows(x_TD)
    block_t, block_d, warps = config(D)
    num_slices, rows_each = slices(T, D, x_TD.device)
    sums_SD = x_TD.new_empty(num_slices, D, dtype=torch.float32) if collect else None
    unit = _triton.unit(D, x_TD.stride(0))
    gate_kernel[math.ceil(D / block_d), num_slices](
        x_TD, None if mask is None else mask.contiguous(), None if valid_T is None else valid_T.float(),
        y_TD, sums_SD, T, D // unit, x_TD.stride(0) // unit, rows_each,
        UNIT=unit, BLOCK_T=block_t, BLOCK_D=block_d, num_warps=warps,
    )  # fmt: skip
    return y_TD, None if sums_SD is None else sums_SD.sum(0)


def compile_cases() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], int, int]]:
    """Name, kernel, signature, constants, warps and stages of every configuration that can be chosen."""
    for block_t, block_d, warps in CONFIGS:
        parts = {"mask and sums": (), "mask": ("sums_SD", "valid_T"), "sums": ("mask_D", "y_TD")}
        for part, dtype, unit in [*((part, "*bf16", 8) for part in parts), ("sums", "*bf16", 1), ("sums", "*fp32", 8)]:
            constants = {"UNIT": unit, "BLOCK_T": block_t, "BLOCK_D": block_d, **dict.fromkeys(parts[part])}
            signature = {"x_TD": dtype, "mask_D": "*fp32", "valid_T": "*fp32", "y_TD": dtype, "sums_SD": "*fp32"}
            signature |= dict.fromkeys(SIZES, "i32") | dict.fromkeys(constants, "constexpr")
            name = f"gate {part} {block_t}x{block_d} {dtype[1:]} unit {unit}"
            yield name, gate_kernel, signature, constants, warps, 3
