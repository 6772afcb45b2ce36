"""Triton kernels of the gated activation: act(g) * u, the unit mask and the gate's column sums in one pass each way.

    h = act(g) * u,  y = h * m                      sums |h|
    dh = dy * m,  dg = dh * u * act'(g),  du = dh * act(g)      sums |dy|

Without u it is ``h = act(g)``. What is saved is g and u. Slices, partial sums, sizes and tiles are those of
`statistics`: elementwise work on at most three tiles of 16 values a thread.

Dimension key: T tokens, D features, S slices of the tokens.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from apt_kernels import _triton
from apt_kernels._triton import contiguous, rows_contiguous
from apt_kernels.loads import load_tile, load_vector, store_tile
from apt_kernels.statistics import added, cut, magnitude, own_slice, store_sums

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
    first, end = own_slice(T, rows_each)
    if mask_D is not None:
        mask = load_vector(mask_D, d, D)
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for start in range(first, end, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        inside = (t[:, None] < end) & (d[None, :] < D)
        g = load_tile(g_TD, t, g_units * UNIT, d, inside)
        h = g * gain(g, KIND)
        if u_TD is not None:
            h *= load_tile(u_TD, t, u_units * UNIT, d, inside)
        y = h
        if mask_D is not None:
            y = h * mask[None, :]
        store_tile(y_TD, t, D, d, y, inside)
        if sums_SD is not None:
            total += magnitude(h, valid_T, t, end)
    if sums_SD is not None:
        store_sums(sums_SD, total, d, D)


@triton.jit(do_not_specialize=BACKWARD_SIZES)
def activation_backward_kernel(
    dy_TD, g_TD, u_TD, mask_D, valid_T, dg_TD, du_TD, sums_SD, T, d_units, dy_units, g_units, u_units, rows_each,
    KIND: tl.constexpr, UNIT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One slice of the tokens, BLOCK_D columns; u, mask, valid, dg, du and sums may be None."""
    D = d_units * UNIT
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    first, end = own_slice(T, rows_each)
    if mask_D is not None:
        mask = load_vector(mask_D, d, D)
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for start in range(first, end, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        inside = (t[:, None] < end) & (d[None, :] < D)
        dy = load_tile(dy_TD, t, dy_units * UNIT, d, inside)
        if sums_SD is not None:
            total += magnitude(dy, valid_T, t, end)
        if mask_D is not None:
            dy *= mask[None, :]
        g = load_tile(g_TD, t, g_units * UNIT, d, inside)
        step = gain(g, KIND)
        if du_TD is not None:
            store_tile(du_TD, t, D, d, dy * (g * step), inside)
        if dg_TD is not None:
            if u_TD is not None:
                dy *= load_tile(u_TD, t, u_units * UNIT, d, inside)
            store_tile(dg_TD, t, D, d, dy * slope(g, step, KIND), inside)
    if sums_SD is not None:
        store_sums(sums_SD, total, d, D)


@_triton.on_own_device
def activation_forward(
    g_TD: Tensor, u_TD: Tensor | None, mask: Tensor | None, valid_T: Tensor | None, kind: str, collect: bool
) -> tuple[Tensor, Tensor | None]:
    """y in the dtype of g, and ``sum_t valid_t |h_t|`` in float32 (None unless asked)."""
    T, D = g_TD.shape
    y_TD = g_TD.new_empty(T, D)
    if y_TD.numel() == 0:
        return y_TD, g_TD.new_zeros(D, dtype=torch.float32) if collect else None
    g_TD, u_TD = rows_contiguous(g_TD), None if u_TD is None else rows_contiguous(u_TD)
    u_stride = D if u_TD is None else u_TD.stride(0)
    unit = _triton.unit(D, g_TD.stride(0), u_stride)
    own = cut(g_TD)
    sums_SD = own.partial_sums(g_TD) if collect else None
    activation_forward_kernel[own.grid](
        g_TD, u_TD, contiguous(mask), None if valid_T is None else valid_T.float(), y_TD, sums_SD,
        T, D // unit, g_TD.stride(0) // unit, u_stride // unit, own.rows_each, KIND=kind, UNIT=unit, **own.tile,
    )  # fmt: skip
    return y_TD, added(sums_SD)


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
    dy_TD, g_TD, u_TD = rows_contiguous(dy_TD), rows_contiguous(g_TD), None if u_TD is None else rows_contiguous(u_TD)
    u_stride = D if u_TD is None else u_TD.stride(0)
    unit = _triton.unit(D, dy_TD.stride(0), g_TD.stride(0), u_stride)
    own = cut(g_TD)
    sums_SD = own.partial_sums(g_TD) if collect else None
    activation_backward_kernel[own.grid](
        dy_TD, g_TD, u_TD, contiguous(mask), None if valid_T is None else valid_T.float(), dg_TD, du_TD, sums_SD,
        T, D // unit, dy_TD.stride(0) // unit, g_TD.stride(0) // unit, u_stride // unit, own.rows_each,
        KIND=kind, UNIT=unit, **own.tile,
    )  # fmt: skip
    return dg_TD, du_TD, added(sums_SD)
