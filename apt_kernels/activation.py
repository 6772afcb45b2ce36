"""Triton kernels of the gated activation: act(g) * u, the unit mask and the gate's column sums in one pass each way.

    h = act(g) * u,  y = h * m                      sums |h|
    dh = dy * m,  dg = dh * u * act'(g),  du = dh * act(g)      sums |dy|

Without u it is ``h = act(g)``. What is saved is g and u. Slices, partial sums and sizes are those of `statistics`.

Dimension key: T tokens, D features, S slices of the tokens.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from apt_kernels import _triton, statistics

CONFIGS = statistics.CONFIGS  # elementwise work on at most three tiles of 16 values a thread
KINDS = ("silu", "gelu", "gelu_tanh")

# In gelu_tanh: sqrt(2 / pi), sqrt(2 / pi) * 0.044715. In gelu: sqrt(1 / 2), 1 / sqrt(2 pi).
TANH_1, TANH_3 = tl.constexpr(0.7978845608028654), tl.constexpr(0.03567740813636141)
ROOT_HALF, DENSITY = tl.constexpr(0.7071067811865476), tl.constexpr(0.3989422804014327)

FORWARD_SIZES = ["T", "d_units", "g_units", "u_units", "rows_each"]
BACKWARD_SIZES = [*FORWARD_SIZES, "dy_units"]


@triton.jit
def gain(g, KIND: tl.constexpr):
    """``act(g) / g``: the smooth step between 0 and 1 that all three activations multiply g by."""
    if KIND == "silu":
        step = tl.sigmoid(g)
    elif KIND == "gelu":
        step = 0.5 * (1.0 + tl.math.erf(g * ROOT_HALF))
    else:
        step = tl.sigmoid(2.0 * g * (TANH_1 + TANH_3 * g * g))  # (1 + tanh z) / 2 = sigmoid(2 z)
    return step


@triton.jit
def slope(g, step, KIND: tl.constexpr):
    """``act'(g)``, given ``step = act(g) / g``."""
    if KIND == "silu":
        rise = step * (1.0 - step)
    elif KIND == "gelu":
        rise = DENSITY * tl.exp(-0.5 * g * g)
    else:
        rise = 2.0 * step * (1.0 - step) * (TANH_1 + 3.0 * TANH_3 * g * g)
    return step + g * rise


@triton.jit(do_not_specialize=FORWARD_SIZES)
def activation_forward_kernel(
    g_TD, u_TD, mask_D, valid_T, y_TD, sums_SD, T, d_units, g_units, u_units, rows_each,
    KIND: tl.constexpr, UNIT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One slice of the tokens, BLOCK_D columns; u, mask, valid and sums may be None."""
    D = d_units * UNIT
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    slice_ = tl.program_id(1).to(tl.int64)
    end = tl.minimum((slice_ + 1) * rows_each, T)
    if mask_D is not None:
        mask = tl.load(mask_D + d, mask=d < D, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for start in range(slice_ * rows_each, end, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        inside = (t[:, None] < end) & (d[None, :] < D)
        g = tl.load(g_TD + t[:, None] * (g_units * UNIT) + d[None, :], mask=inside, other=0.0).to(tl.float32)
        h = g * gain(g, KIND)
        if u_TD is not None:
            h *= tl.load(u_TD + t[:, None] * (u_units * UNIT) + d[None, :], mask=inside, other=0.0).to(tl.float32)
        y = h
        if mask_D is not None:
            y = h * mask[None, :]
        tl.store(y_TD + t[:, None] * D + d[None, :], y.to(y_TD.dtype.element_ty), mask=inside)
        if sums_SD is not None:
            size = tl.abs(h)
            if valid_T is not None:
                size *= tl.load(valid_T + t, mask=t < end, other=0.0)[:, None]
            total += size
    if sums_SD is not None:
        tl.store(sums_SD + slice_ * D + d, tl.sum(total, 0), mask=d < D)


@triton.jit(do_not_specialize=BACKWARD_SIZES)
def activation_backward_kernel(
    dy_TD, g_TD, u_TD, mask_D, valid_T, dg_TD, du_TD, sums_SD, T, d_units, dy_units, g_units, u_units, rows_each,
    KIND: tl.constexpr, UNIT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One slice of the tokens, BLOCK_D columns; u, mask, valid, dg, du and sums may be None."""
    D = d_units * UNIT
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    slice_ = tl.program_id(1).to(tl.int64)
    end = tl.minimum((slice_ + 1) * rows_each, T)
    if mask_D is not None:
        mask = tl.load(mask_D + d, mask=d < D, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for start in range(slice_ * rows_each, end, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        inside = (t[:, None] < end) & (d[None, :] < D)
        dy = tl.load(dy_TD + t[:, None] * (dy_units * UNIT) + d[None, :], mask=inside, other=0.0).to(tl.float32)
        if sums_SD is not None:
            size = tl.abs(dy)
            if valid_T is not None:
                size *= tl.load(valid_T + t, mask=t < end, other=0.0)[:, None]
            total += size
        if mask_D is not None:
            dy *= mask[None, :]
        g = tl.load(g_TD + t[:, None] * (g_units * UNIT) + d[None, :], mask=inside, other=0.0).to(tl.float32)
        step = gain(g, KIND)
        place = t[:, None] * D + d[None, :]
        if du_TD is not None:
            tl.store(du_TD + place, (dy * (g * step)).to(du_TD.dtype.element_ty), mask=inside)
        if dg_TD is not None:
            if u_TD is not None:
                dy *= tl.load(u_TD + t[:, None] * (u_units * UNIT) + d[None, :], mask=inside, other=0.0).to(tl.float32)
            tl.store(dg_TD + place, (dy * slope(g, step, KIND)).to(dg_TD.dtype.element_ty), mask=inside)
    if sums_SD is not None:
        tl.store(sums_SD + slice_ * D + d, tl.sum(total, 0), mask=d < D)


@_triton.on_own_device
def activation_forward(
    g_TD: Tensor, u_TD: Tensor | None, mask: Tensor | None, valid_T: Tensor | None, kind: str, collect: bool
) -> tuple[Tensor, Tensor | None]:
    """y in the dtype of g, and ``sum_t valid_t |h_t|`` in float32 (None unless asked)."""
    T, D = g_TD.shape
    y_TD = g_TD.new_empty(T, D)
    if y_TD.numel() == 0:
        return y_TD, g_TD.new_zeros(D, dtype=torch.float32) if collect else None
    g_TD, u_TD = statistics.rows(g_TD), None if u_TD is None else statistics.rows(u_TD)
    u_stride = D if u_TD is None else u_TD.stride(0)
    unit = _triton.unit(D, g_TD.stride(0), u_stride)
    block_t, block_d, warps = statistics.config(D)
    num_slices, rows_each = statistics.slices(T, D, g_TD.device)
    sums_SD = g_TD.new_empty(num_slices, D, dtype=torch.float32) if collect else None
    activation_forward_kernel[math.ceil(D / block_d), num_slices](
        g_TD, u_TD, None if mask is None else mask.contiguous(), None if valid_T is None else valid_T.float(),
        y_TD, sums_SD, T, D // unit, g_TD.stride(0) // unit, u_stride // unit, rows_each,
        KIND=kind, UNIT=unit, BLOCK_T=block_t, BLOCK_D=block_d, num_warps=warps,
    )  # fmt: skip
    return y_TD, None if sums_SD is None else sums_SD.sum(0)


@_triton.on_own_device
def activation_backward(
    dy_TD: Tensor,
    g_TD: Tensor,
    u_TD: Tensor | None,
    mask: Tensor | None,
    valid_T: Tensor | None,
    kind: str,
    collect: bool,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of g and u in their dtype (None where not needed), and ``sum_t valid_t |dy_t|`` in float32."""
    T, D = g_TD.shape
    dg_TD, du_TD = (g_TD.new_empty(T, D) if need else None for need in needs)
    if g_TD.numel() == 0:
        return dg_TD, du_TD, g_TD.new_zeros(D, dtype=torch.float32) if collect else None
    dy_TD, g_TD, u_TD = statistics.rows(dy_TD), statistics.rows(g_TD), None if u_TD is None else statistics.rows(u_TD)
    u_stride = D if u_TD is None else u_TD.stride(0)
    unit = _triton.unit(D, dy_TD.stride(0), g_TD.stride(0), u_stride)
    block_t, block_d, warps = statistics.config(D)
    num_slices, rows_each = statistics.slices(T, D, g_TD.device)
    sums_SD = g_TD.new_empty(num_slices, D, dtype=torch.float32) if collect else None
    activation_backward_kernel[math.ceil(D / block_d), num_slices](
        dy_TD, g_TD, u_TD, None if mask is None else mask.contiguous(),
        None if valid_T is None else valid_T.float(), dg_TD, du_TD, sums_SD,
        T, D // unit, dy_TD.stride(0) // unit, g_TD.stride(0) // unit, u_stride // unit, rows_each,
        KIND=kind, UNIT=unit, BLOCK_T=block_t, BLOCK_D=block_d, num_warps=warps,
    )  # fmt: skip
    return dg_TD, du_TD, None if sums_SD is None else sums_SD.sum(0)


def compile_cases() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], int, int]]:
    """Name, kernel, signature, constants, warps and stages of every configuration that can be chosen."""
    forward, backward = activation_forward_kernel, activation_backward_kernel
    lone: dict[str, Any] = {"u_TD": None, "sums_SD": None, "valid_T": None}
    whole: list[Any] = [(kind, config, "*bf16", 8, {}) for config in CONFIGS for kind in KINDS]
    others = [("silu", CONFIGS[0], "*bf16", 8, lone), ("gelu", CONFIGS[0], "*bf16", 1, {})]
    for kind, (block_t, block_d, warps), dtype, unit, extra in [*whole, *others, ("gelu", CONFIGS[0], "*fp32", 8, {})]:
        types = dict.fromkeys(("g_TD", "u_TD", "dy_TD", "y_TD", "dg_TD", "du_TD"), dtype)
        types |= dict.fromkeys(("mask_D", "valid_T", "sums_SD"), "*fp32") | dict.fromkeys(BACKWARD_SIZES, "i32")
        tiles = {"KIND": kind, "UNIT": unit, "BLOCK_T": block_t, "BLOCK_D": block_d, **extra}
        text = f"{'activation' if extra else 'gated activation'} {kind} {block_t}x{block_d} {dtype[1:]} unit {unit}"
        lone_backward = {"du_TD": None} if extra else {}
        for way, kernel, constants in (("forward", forward, tiles), ("backward", backward, tiles | lone_backward)):
            signature = types | dict.fromkeys(constants, "constexpr")
            yield f"{text} {way}", kernel, {arg: signature[arg] for arg in kernel.arg_names}, constants, warps, 3
