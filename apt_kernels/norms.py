"""Triton kernels of LayerNorm and RMSNorm with mask-weighted statistics. A whole row lies in one block.

    n = sum m,  mean = sum m x / n (0 for RMSNorm),  var = sum m (x - mean)^2 / n
    y = (x - mean) * rstd * w + b                    with rstd = 1 / sqrt(var + eps)

    g = dy * w,  xhat = (x - mean) * rstd
    dx = rstd * (g - m / n * (xhat * sum(g xhat) + sum g))          the last sum for LayerNorm only
    dw = sum_t dy * xhat,  db = sum_t dy

Saved are x and two floats a row. dw and db, which most runs freeze, have a pass of their own, so that the row kernel
keeps no sums in its registers; their partial sums are reduced in a fixed order.

Dimension key: T tokens, D features, S slices of the tokens.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from apt_kernels import _triton, statistics
from apt_kernels._triton import contiguous, rows_contiguous
from apt_kernels.loads import load_tile, load_vector, store_tile
from apt_kernels.statistics import added, cut, own_slice, store_sums

# Rows, block of features, warps: 16 elements a thread, 32 in the last, so that x, dy, w and m fit into its registers.
CONFIGS = ((16, 128, 4), (2, 1024, 4), (1, 2048, 4), (1, 4096, 8), (1, 8192, 16), (1, 16384, 16))
MAX_FEATURES = CONFIGS[-1][1]
WIDE, WIDE_BLOCK, WIDE_WARPS = CONFIGS[-2][1], 2048, 8  # above WIDE, backward over unaligned rows goes block by block
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)  # instead of n where every mask is 0: statistics are 0, not NaN

ROW_SIZES = ["T", "d_units", "x_units"]
BACKWARD_SIZES = [*ROW_SIZES, "dy_units"]
WEIGHT_SIZES = [*BACKWARD_SIZES, "rows_each"]


@triton.jit
def share_of(mask_D, d, D):
    """``m / n``: what each dimension weighs in the statistics; 0 past the end."""
    if mask_D is None:
        share = tl.where(d < D, 1.0, 0.0) / D
    else:
        mask = load_vector(mask_D, d, D)
        share = mask / tl.maximum(tl.sum(mask, 0), TINY)
    return share


@triton.jit(do_not_specialize=ROW_SIZES)
def norm_forward_kernel(
    x_TD, weight_D, bias_D, mask_D, y_TD, mean_T, rstd_T, T, d_units, x_units, eps,
    CENTRED: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """ROWS rows, in two steps over registers: the mean first, then the variance about it."""
    D = d_units * UNIT
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    inside = (t[:, None] < T) & (d[None, :] < D)
    x = load_tile(x_TD, t, x_units * UNIT, d, inside)
    share = share_of(mask_D, d, D)[None, :]
    mean = tl.zeros((ROWS,), tl.float32)
    if CENTRED:
        mean = tl.sum(x * share, 1)
        x -= mean[:, None]
    rstd = 1.0 / tl.sqrt(tl.sum(x * x * share, 1) + eps)
    tl.store(mean_T + t, mean, mask=t < T)
    tl.store(rstd_T + t, rstd, mask=t < T)
    y = x * rstd[:, None] * load_vector(weight_D, d, D)[None, :]
    if bias_D is not None:
        y += load_vector(bias_D, d, D)[None, :]
    store_tile(y_TD, t, D, d, y, inside)


@triton.jit(do_not_specialize=BACKWARD_SIZES)
def norm_backward_kernel(
    dy_TD, x_TD, weight_D, mask_D, mean_T, rstd_T, dx_TD, T, d_units, x_units, dy_units,
    CENTRED: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradient of ROWS rows of x."""
    D = d_units * UNIT
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    inside = (t[:, None] < T) & (d[None, :] < D)
    x = load_tile(x_TD, t, x_units * UNIT, d, inside)
    dy = load_tile(dy_TD, t, dy_units * UNIT, d, inside)
    # dy and w are spent before anything else is loaded, m comes last: in another order the widest block spills.
    g = dy * load_vector(weight_D, d, D)[None, :]
    mean = load_vector(mean_T, t, T)[:, None]
    rstd = load_vector(rstd_T, t, T)[:, None]
    xhat = (x - mean) * rstd
    shift = tl.zeros((ROWS, 1), tl.float32)
    if CENTRED:
        shift = tl.sum(g, 1)[:, None]
    along = xhat * tl.sum(g * xhat, 1)[:, None] + shift
    dx = rstd * (g - share_of(mask_D, d, D)[None, :] * along)
    store_tile(dx_TD, t, D, d, dx, inside)


@triton.jit(do_not_specialize=BACKWARD_SIZES)
def norm_backward_wide_kernel(
    dy_TD, x_TD, weight_D, mask_D, mean_T, rstd_T, dx_TD, T, d_units, x_units, dy_units,
    CENTRED: tl.constexpr, UNIT: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The same of one row, block by block and read twice: unaligned, the widest rows do not fit into registers."""
    D = d_units * UNIT
    t = tl.program_id(0).to(tl.int64)
    x_TD += t * (x_units * UNIT)
    dy_TD += t * (dy_units * UNIT)
    dx_TD += t * D
    mean, rstd = tl.load(mean_T + t), tl.load(rstd_T + t)
    along, total = tl.zeros((BLOCK_D,), tl.float32), tl.zeros((BLOCK_D,), tl.float32)
    masks = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        g = load_vector(dy_TD, d, D) * load_vector(weight_D, d, D)
        along += g * (load_vector(x_TD, d, D) - mean)
        total += g
        if mask_D is not None:
            masks += load_vector(mask_D, d, D)
    slope, shift, num = tl.sum(along, 0) * rstd, 0.0, 1.0 * D
    if CENTRED:
        shift = tl.sum(total, 0)
    if mask_D is not None:
        num = tl.maximum(tl.sum(masks, 0), TINY)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        g = load_vector(dy_TD, d, D) * load_vector(weight_D, d, D)
        xhat = (load_vector(x_TD, d, D) - mean) * rstd
        share = 1.0 / num
        if mask_D is not None:
            share = load_vector(mask_D, d, D) / num
        dx = rstd * (g - share * (xhat * slope + shift))
        tl.store(dx_TD + d, dx.to(dx_TD.dtype.element_ty), mask=d < D)


@triton.jit(do_not_specialize=WEIGHT_SIZES)
def norm_weight_kernel(
    dy_TD, x_TD, mean_T, rstd_T, dw_SD, db_SD, T, d_units, x_units, dy_units, rows_each,
    UNIT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Partial dw and db of one slice of the tokens, BLOCK_D columns; a None pointer leaves its part out."""
    D = d_units * UNIT
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    first, end = own_slice(T, rows_each)
    dw = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    db = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for start in range(first, end, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        inside = (t[:, None] < end) & (d[None, :] < D)
        dy = load_tile(dy_TD, t, dy_units * UNIT, d, inside)
        if dw_SD is not None:
            x = load_tile(x_TD, t, x_units * UNIT, d, inside)
            mean = load_vector(mean_T, t, end)[:, None]
            rstd = load_vector(rstd_T, t, end)[:, None]
            dw += dy * ((x - mean) * rstd)
        if db_SD is not None:
            db += dy
    if dw_SD is not None:
        store_sums(dw_SD, dw, d, D)
    if db_SD is not None:
        store_sums(db_SD, db, d, D)


def config(D: int) -> tuple[int, int, int]:
    """Rows, block and warps of the smallest block that holds a row."""
    if D > MAX_FEATURES:
        raise ValueError(f"masked_norm: the kernel holds rows of up to {MAX_FEATURES} features, got {D}")
    return next(config for config in CONFIGS if config[1] >= D)


@_triton.on_own_device
def norm_forward(
    x_TD: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, eps: float, centred: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y in the dtype of x, and the mean and 1 / deviation of each row in float32."""
    T, D = x_TD.shape
    y_TD = x_TD.new_empty(T, D)
    mean_T, rstd_T = (x_TD.new_empty(T, dtype=torch.float32) for _ in range(2))
    num_rows, block, warps = config(D)
    if y_TD.numel() == 0:
        return y_TD, mean_T.zero_(), rstd_T.zero_()
    x_TD = rows_contiguous(x_TD)
    unit = _triton.unit(D, x_TD.stride(0))
    norm_forward_kernel[(math.ceil(T / num_rows),)](
        x_TD, weight.contiguous(), contiguous(bias), contiguous(mask), y_TD, mean_T, rstd_T,
        T, D // unit, x_TD.stride(0) // unit, eps,
        CENTRED=centred, UNIT=unit, ROWS=num_rows, BLOCK_D=block, num_warps=warps,
    )  # fmt: skip
    return y_TD, mean_T, rstd_T


@_triton.on_own_device
def norm_backward(
    dy_TD: Tensor,
    x_TD: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    mean_T: Tensor,
    rstd_T: Tensor,
    centred: bool,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, in its dtype, and of weight and bias, in float32; None where not needed."""
    x_TD, dy_TD = rows_contiguous(x_TD), rows_contiguous(dy_TD)
    dx_TD = _row_gradients(dy_TD, x_TD, weight, mask, mean_T, rstd_T, centred) if needs[0] else None
    return dx_TD, *_weight_gradients(dy_TD, x_TD, mean_T, rstd_T, needs[1:])


def _row_gradients(
    dy_TD: Tensor, x_TD: Tensor, weight: Tensor, mask: Tensor | None, mean_T: Tensor, rstd_T: Tensor, centred: bool
) -> Tensor:
    T, D = x_TD.shape
    dx_TD = x_TD.new_empty(T, D)
    num_rows, block, warps = config(D)
    if dx_TD.numel() == 0:
        return dx_TD
    unit = _triton.unit(D, x_TD.stride(0), dy_TD.stride(0))
    args = (
        dy_TD, x_TD, weight.contiguous(), contiguous(mask), mean_T, rstd_T, dx_TD,
        T, D // unit, x_TD.stride(0) // unit, dy_TD.stride(0) // unit,
    )  # fmt: skip
    if unit == 1 and D > WIDE:
        norm_backward_wide_kernel[(T,)](*args, CENTRED=centred, UNIT=1, BLOCK_D=WIDE_BLOCK, num_warps=WIDE_WARPS)
    else:
        norm_backward_kernel[(math.ceil(T / num_rows),)](
            *args, CENTRED=centred, UNIT=unit, ROWS=num_rows, BLOCK_D=block, num_warps=warps
        )
    return dx_TD


def _weight_gradients(
    dy_TD: Tensor, x_TD: Tensor, mean_T: Tensor, rstd_T: Tensor, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    T, D = x_TD.shape
    if not any(needs):
        return None, None
    if x_TD.numel() == 0:
        grad_weight, grad_bias = (x_TD.new_zeros(D, dtype=torch.float32) if need else None for need in needs)
        return grad_weight, grad_bias
    unit = _triton.unit(D, x_TD.stride(0), dy_TD.stride(0))
    own = cut(x_TD)
    # Loads of one element a time take so many registers that the tile for few columns would spill.
    tile = own.tile if unit == 8 else statistics.tile(statistics.CONFIGS[0])
    dw_SD, db_SD = (own.partial_sums(x_TD) if need else None for need in needs)
    norm_weight_kernel[own.grid](
        dy_TD, x_TD, mean_T, rstd_T, dw_SD, db_SD,
        T, D // unit, x_TD.stride(0) // unit, dy_TD.stride(0) // unit, own.rows_each, UNIT=unit, **tile,
    )  # fmt: skip
    return added(dw_SD), added(db_SD)
