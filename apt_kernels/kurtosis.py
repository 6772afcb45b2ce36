"""Triton kernels of the weight kurtosis: one read of W, the low-rank part added tile by tile.

    V = W + s B A,   O = V diag(c)      kurtosis of V per column, of O per block of columns and per row

A program takes a tile of V and writes, for each of its columns and rows, the mean and the sums of the second, third and
fourth powers of the distance from that mean. A second kernel joins the tiles in float64, exactly, by the binomial
formula. The tile's own mean is the pivot: raw power sums lose all digits where the mean outweighs the deviation (off by
17 at a ratio of 100), and a fixed pivot does where it happens to be an outlier, which heavy tails are made of.

Dimension key: I in, O out, R rank, N columns or rows, S tiles along the other axis; 4 for mean, M2, M3, M4.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from apt_kernels import _triton
from apt_kernels._triton import contiguous, rows_contiguous
from apt_kernels.loads import dot, load_tile, load_vector

CONFIGS = ((64, 128, 8),)  # BLOCK_O, BLOCK_I, warps: 32 values a thread, so that tile and powers stay in registers
BLOCK_R = 16  # the least tl.dot takes
JOIN_S, JOIN_N = 16, 64  # tile of the joining kernel: 8 values a thread in float64

TILE_SIZES = ["O", "i_units", "R", "w_units", "a_units"]
JOIN_SIZES = ["S", "N", "each", "total"]


@triton.jit
def store_four(out_4N, N, place, live, mean, m2, m3, m4):
    """Mean and power sums, to ``out[0..3, place]``."""
    tl.store(out_4N + place, mean, mask=live)
    tl.store(out_4N + N + place, m2, mask=live)
    tl.store(out_4N + 2 * N + place, m3, mask=live)
    tl.store(out_4N + 3 * N + place, m4, mask=live)


@triton.jit
def store_moments(v, inside, out, N, place, live, AXIS: tl.constexpr, count):
    """Mean and power sums about it of a tile along AXIS, to ``out[0..3, place]``."""
    mean = tl.sum(v, AXIS) / count  # v is 0 outside
    d = tl.where(inside, v - tl.expand_dims(mean, AXIS), 0.0)
    d2 = d * d
    store_four(out, N, place, live, mean, tl.sum(d2, AXIS), tl.sum(d2 * d, AXIS), tl.sum(d2 * d2, AXIS))


@triton.jit(do_not_specialize=TILE_SIZES)
def tile_moments_kernel(
    weight_OI, b_OR, a_RI, by_I, columns_S4I, rows_S4O, O, i_units, R, w_units, a_units, scale,
    UNIT: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One tile. Without `a_RI` there is no low-rank part, without `by_I` the column scale is 1."""
    I = i_units * UNIT
    tile_i, tile_o = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    i = tile_i * BLOCK_I + tl.arange(0, BLOCK_I)
    o = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    inside = (o[:, None] < O) & (i[None, :] < I)
    if a_RI is not None:
        low = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
        for start in range(0, R, BLOCK_R):
            r = start + tl.arange(0, BLOCK_R)
            b = tl.load(b_OR + o[:, None] * R + r[None, :], mask=(o[:, None] < O) & (r[None, :] < R), other=0.0)
            a_place = r[:, None].to(tl.int64) * (a_units * UNIT) + i[None, :]
            a = tl.load(a_RI + a_place, mask=(r[:, None] < R) & (i[None, :] < I), other=0.0)
            low = dot(b, a, low, WIDEN, PRECISION)
    # W after the loop, which needs the registers.
    v = load_tile(weight_OI, o, w_units * UNIT, i, inside)
    if a_RI is not None:
        v += scale * low
    num_o, num_i = tl.minimum(O - tile_o * BLOCK_O, BLOCK_O), tl.minimum(I - tile_i * BLOCK_I, BLOCK_I)
    store_moments(v, inside, columns_S4I + tile_o * 4 * I, I, i, i < I, 0, num_o)
    if by_I is not None:
        v *= load_vector(by_I, i, I)[None, :]
    store_moments(v, inside, rows_S4O + tile_i * 4 * O, O, o, o < O, 1, num_i)


@triton.jit
def load_moment(parts_S4N, moment, s, n, S, N):
    """The mean (0), M2, M3 or M4 (3) of a block of tiles, in float64."""
    place = parts_S4N + s[:, None].to(tl.int64) * (4 * N) + n[None, :] + moment * N
    return tl.load(place, mask=(s[:, None] < S) & (n[None, :] < N), other=0.0).to(tl.float64)


@triton.jit
def entries(s, each, total):
    """How many entries each tile has, in float64: the last one fewer, those past the end none."""
    return tl.maximum(tl.minimum(total - s * each, each), 0).to(tl.float64)[:, None]


@triton.jit(do_not_specialize=JOIN_SIZES)
def join_kernel(parts_S4N, moments_4N, S, N, each, total, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr):
    """Join S tiles of `each` entries, the last one shorter, `total` in all, for BLOCK_N columns or rows."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mean = tl.zeros((BLOCK_S, BLOCK_N), tl.float64)
    for start in range(0, S, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        mean += entries(s, each, total) * load_moment(parts_S4N, 0, s, n, S, N)
    mean_N = tl.sum(mean, 0) / total
    m2, m3, m4 = tl.zeros_like(mean), tl.zeros_like(mean), tl.zeros_like(mean)
    for start in range(0, S, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        count = entries(s, each, total)
        d = load_moment(parts_S4N, 0, s, n, S, N) - mean_N[None, :]
        p2 = load_moment(parts_S4N, 1, s, n, S, N)
        p3 = load_moment(parts_S4N, 2, s, n, S, N)
        p4 = load_moment(parts_S4N, 3, s, n, S, N)
        d2 = d * d
        m2 += p2 + count * d2
        m3 += p3 + 3.0 * d * p2 + count * d2 * d
        m4 += p4 + 4.0 * d * p3 + 6.0 * d2 * p2 + count * d2 * d2
    store_four(moments_4N, N, n, n < N, mean_N, tl.sum(m2, 0), tl.sum(m3, 0), tl.sum(m4, 0))


def join(parts_S4N: Tensor, each: int, total: int) -> Tensor:
    """Mean and power sums about it, ``[4, N]`` in float64, of tiles of `each` entries, `total` in all."""
    S, _, N = parts_S4N.shape
    moments_4N = parts_S4N.new_empty(4, N, dtype=torch.float64)
    join_kernel[(math.ceil(N / JOIN_N),)](
        parts_S4N, moments_4N, S, N, each, total, BLOCK_S=JOIN_S, BLOCK_N=JOIN_N, num_warps=4
    )
    return moments_4N


def join_groups(moments_4I: Tensor, group: int, each: int) -> Tensor:
    """The same of each block of `group` columns that hold `each` entries each, ``[4, I / group]``."""
    mean, m2, m3, m4 = moments_4I.unflatten(1, (moments_4I.shape[1] // group, group))
    mean_G = mean.mean(1)
    d = mean - mean_G[:, None]
    return torch.stack(
        [
            mean_G,
            (m2 + each * d**2).sum(1),
            (m3 + 3 * d * m2 + each * d**3).sum(1),
            (m4 + 4 * d * m3 + 6 * d**2 * m2 + each * d**4).sum(1),
        ]
    )


def kurtosis(moments_4N: Tensor, total: int) -> Tensor:
    """``m4 / m2^2 - 3`` of the population, in float32; -3 where all entries are equal."""
    _, m2, _, m4 = moments_4N
    return torch.where(m2 > 0, total * m4 / m2.square(), 0.0).sub(3.0).float()


@_triton.on_own_device
def weight_kurtosis(
    weight_OI: Tensor, a_RI: Tensor | None, b_OR: Tensor | None, scale: float, group: int, column_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Kurtosis of each block of `group` columns and of each row, in float32."""
    O, I = weight_OI.shape
    if weight_OI.numel() == 0:
        none = weight_OI.new_full((I // group + O,), -3.0, dtype=torch.float32)
        return none[: I // group].clone(), none[I // group :].clone()
    block_o, block_i, warps = CONFIGS[0]
    weight_OI, a_stride, R, precision = rows_contiguous(weight_OI), 0, 0, "ieee"
    if a_RI is not None and b_OR is not None:
        dtype = torch.promote_types(a_RI.dtype, b_OR.dtype)
        a_RI, b_OR = rows_contiguous(a_RI.to(dtype)), b_OR.to(dtype).contiguous()
        a_stride, R, precision = a_RI.stride(0), a_RI.shape[0], _triton.precision(dtype)
    unit = _triton.unit(I, weight_OI.stride(0), a_stride)
    columns_S4I = weight_OI.new_empty(math.ceil(O / block_o), 4, I, dtype=torch.float32)
    rows_S4O = weight_OI.new_empty(math.ceil(I / block_i), 4, O, dtype=torch.float32)
    tile_moments_kernel[len(rows_S4O), len(columns_S4I)](
        weight_OI, b_OR, a_RI, contiguous(column_scale), columns_S4I, rows_S4O,
        O, I // unit, R, weight_OI.stride(0) // unit, a_stride // unit, scale,
        UNIT=unit, WIDEN=a_RI is not None and _triton.widened(a_RI.dtype), PRECISION=precision,
        BLOCK_O=block_o, BLOCK_I=block_i, BLOCK_R=BLOCK_R, num_warps=warps,
    )  # fmt: skip
    columns_4I, rows_4O = join(columns_S4I, block_o, O), join(rows_S4O, block_i, I)
    if column_scale is not None:
        powers = torch.arange(1, 5, device=weight_OI.device)[:, None]  # of mean, M2, M3, M4
        columns_4I = columns_4I * column_scale.double() ** powers
    return kurtosis(join_groups(columns_4I, group, O), O * group), kurtosis(rows_4O, I)
