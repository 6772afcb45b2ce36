"""Triton kernels of the large products: the frozen weight with the low-rank part in the same loop.

Each is one loop over a joint inner range, first the frozen operand, then the rank: one pipeline, nothing drained
between the two, and far fewer registers than two loops. `forward` and `backward` load by pointers and run anywhere;
`forward_tma` and `backward_tma` are persistent and load by host-made tensor descriptors (sm_90).

Dimension key: T tokens, I in, O out, P rank padded to a multiple of 16. Sizes come in units of UNIT elements.
"""

import triton
import triton.language as tl

from apt_kernels.loads import dot, load_vector, store_tile

SIZES = ["T", "i_units", "o_units", "p_units", "x_units", "w_units", "y_units", "a_units", "h_units"]


@triton.jit
def tile_of(number, num_rows, num_cols, GROUP: tl.constexpr):
    """Row and column of a tile: GROUP rows of tiles are walked together, so their operands stay in the cache."""
    per_group = GROUP * num_cols
    first = (number // per_group) * GROUP
    height = tl.minimum(num_rows - first, GROUP)
    inside = number % per_group
    return first + inside % height, inside // height


@triton.jit
def with_bias_and_mask(acc, bias, mask_out, o, O, BIAS: tl.constexpr, MASK_OUT: tl.constexpr):
    """``m_out * (acc + bias)``, each where it is there."""
    if BIAS:
        acc += load_vector(bias, o, O)[None, :]
    if MASK_OUT:
        acc *= load_vector(mask_out, o, O)[None, :]
    return acc


@triton.jit(do_not_specialize=SIZES)
def forward(
    x_TI, w_OI, h_TP, b_OP, bias, mask_in, mask_out, y_TO, T, i_units, o_units, p_units, x_units, w_units, h_units,
    BIAS: tl.constexpr, MASK_IN: tl.constexpr, MASK_OUT: tl.constexpr, UNIT: tl.constexpr, WIDEN: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """``y = m_out * ([m_in * x | h] [W | B]^T + bias)``, where h and B carry scale, gate and dropout."""
    I, O, P, sx, sw = i_units * UNIT, o_units * UNIT, p_units * 16, x_units * UNIT, w_units * UNIT
    pm, pn = tile_of(tl.program_id(0), tl.cdiv(T, BM), tl.cdiv(O, BN), GROUP)
    row, col = tl.arange(0, BM), tl.arange(0, BN)
    left_T, left_O = T - pm * BM, O - pn * BN
    # The tile's corner is a 64-bit offset; inside it 32 bits do. Rows past the end read the first and are not stored.
    corner_x, corner_h = (pm * BM).to(tl.int64) * sx, (pm * BM).to(tl.int64) * (h_units * 16)
    corner_w, corner_b = (pn * BN).to(tl.int64) * sw, (pn * BN).to(tl.int64) * P
    live_T, live_O = tl.where(row < left_T, row, 0), tl.where(col < left_O, col, 0)
    frozen_steps = tl.cdiv(I, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for step in range(0, frozen_steps + tl.cdiv(P, BK)):
        low = step >= frozen_steps
        k = tl.where(low, step - frozen_steps, step) * BK + tl.arange(0, BK)
        inside = k[None, :] < tl.where(low, P, I)
        # Chosen between are the tensors themselves, before any offset: Triton 3.6 fails on what was moved (gfx942).
        left = tl.where(low, h_TP, x_TI) + tl.where(low, corner_h, corner_x)
        right = tl.where(low, b_OP, w_OI) + tl.where(low, corner_b, corner_w)
        x = tl.load(left + live_T[:, None] * tl.where(low, h_units * 16, sx) + k[None, :], mask=inside, other=0.0)
        w = tl.load(right + live_O[:, None] * tl.where(low, P, sw) + k[None, :], mask=inside, other=0.0)
        if WIDEN:
            x, w = x.to(tl.float32), w.to(tl.float32)
        if MASK_IN:
            m = tl.load(mask_in + k, mask=k < tl.where(low, 0, I), other=1.0)
            x = x * m[None, :].to(x.dtype)
        acc = tl.dot(x, w.T, acc, input_precision=PRECISION)
    o = pn * BN + col
    acc = with_bias_and_mask(acc, bias, mask_out, o, O, BIAS, MASK_OUT)
    kept = (row[:, None] < left_T) & (o[None, :] < O)
    store_tile(y_TO + (pm * BM).to(tl.int64) * O, row, O, o, acc, kept)


@triton.jit(do_not_specialize=SIZES)
def one_kernel(
    x_TI, w_OI, a_PI, b_OP, bias, mask_in, mask_out, y_TO, z_TP,
    T, i_units, o_units, p_units, x_units, w_units, a_units,
    BIAS: tl.constexpr, MASK_IN: tl.constexpr, MASK_OUT: tl.constexpr, UNIT: tl.constexpr, WIDEN: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """`forward` with the rank-R product made anew in every tile: no pass over x for it. For few outputs; P <= BR."""
    I, O, P, sx, sw = i_units * UNIT, o_units * UNIT, p_units * 16, x_units * UNIT, w_units * UNIT
    pm, pn = tile_of(tl.program_id(0), tl.cdiv(T, BM), tl.cdiv(O, BN), GROUP)
    row, col, rank = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BR)
    left_T, left_O = T - pm * BM, O - pn * BN
    x_TI += (pm * BM).to(tl.int64) * sx
    w_OI += (pn * BN).to(tl.int64) * sw
    live_T, live_O = tl.where(row < left_T, row, 0), tl.where(col < left_O, col, 0)
    acc = tl.zeros((BM, BN), tl.float32)
    z = tl.zeros((BM, BR), tl.float32)
    for start in range(0, I, BK):
        k = start + tl.arange(0, BK)
        inside = k[None, :] < I
        x = tl.load(x_TI + live_T[:, None] * sx + k[None, :], mask=inside, other=0.0)
        w = tl.load(w_OI + live_O[:, None] * sw + k[None, :], mask=inside, other=0.0)
        a = tl.load(a_PI + rank[:, None] * (a_units * 8) + k[None, :], mask=(rank[:, None] < P) & inside, other=0.0)
        if WIDEN:
            x, w, a = x.to(tl.float32), w.to(tl.float32), a.to(tl.float32)
        z = tl.dot(x, a.T, z, input_precision=PRECISION)  # the packed A carries the input mask
        if MASK_IN:
            x = x * tl.load(mask_in + k, mask=k < I, other=0.0)[None, :].to(x.dtype)
        acc = tl.dot(x, w.T, acc, input_precision=PRECISION)
    low = z.to(z_TP.dtype.element_ty)
    o = pn * BN + col
    b = tl.load(b_OP + o[:, None] * P + rank[None, :], mask=(o[:, None] < O) & (rank[None, :] < P), other=0.0)
    acc = dot(low, b.T, acc, WIDEN, PRECISION)
    acc = with_bias_and_mask(acc, bias, mask_out, o, O, BIAS, MASK_OUT)
    kept = (row[:, None] < left_T) & (o[None, :] < O)
    store_tile(y_TO + (pm * BM).to(tl.int64) * O, row, O, o, acc, kept)
    if pn == 0:
        kept_P = (row[:, None] < left_T) & (rank[None, :] < P)
        store_tile(z_TP + (pm * BM).to(tl.int64) * P, row, P, rank, low, kept_P)


@triton.jit(do_not_specialize=SIZES)
def backward(
    dy_TO, w_OI, ts_TP, a_PI, mask_in, mask_out, dx_TI, T, i_units, o_units, p_units, y_units, w_units, a_units,
    MASK_IN: tl.constexpr, MASK_OUT: tl.constexpr, UNIT: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """``dx = m_in * ([m_out * dy | ts] [W ; A])``: the inner range runs over the outputs, then over the rank."""
    I, O, P, sy, sw = i_units * UNIT, o_units * UNIT, p_units * 16, y_units * UNIT, w_units * UNIT
    pm, pn = tile_of(tl.program_id(0), tl.cdiv(T, BM), tl.cdiv(I, BN), GROUP)
    row = tl.arange(0, BM)
    i = pn * BN + tl.arange(0, BN)
    left_T = T - pm * BM
    corner_dy, corner_ts = (pm * BM).to(tl.int64) * sy, (pm * BM).to(tl.int64) * P
    live_T = tl.where(row < left_T, row, 0)
    frozen_steps = tl.cdiv(O, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for step in range(0, frozen_steps + tl.cdiv(P, BK)):
        low = step >= frozen_steps
        k = tl.where(low, step - frozen_steps, step) * BK + tl.arange(0, BK)
        size = tl.where(low, P, O)
        left = tl.where(low, ts_TP, dy_TO) + tl.where(low, corner_ts, corner_dy)
        dy = tl.load(left + live_T[:, None] * tl.where(low, P, sy) + k[None, :], mask=k[None, :] < size, other=0.0)
        # Only rows may be clamped or looked up; the contiguous index i stays plain and masked, or loads turn scalar.
        w = tl.load(
            tl.where(low, a_PI, w_OI) + k[:, None].to(tl.int64) * tl.where(low, a_units * 8, sw) + i[None, :],
            mask=(k[:, None] < size) & (i[None, :] < I),
            other=0.0,
        )
        if WIDEN:
            dy, w = dy.to(tl.float32), w.to(tl.float32)
        if MASK_OUT:
            m = tl.load(mask_out + k, mask=k < tl.where(low, 0, O), other=1.0)
            dy = dy * m[None, :].to(dy.dtype)
        acc = tl.dot(dy, w, acc, input_precision=PRECISION)
    if MASK_IN:
        acc *= load_vector(mask_in, i, I)[None, :]
    kept = (row[:, None] < left_T) & (i[None, :] < I)
    store_tile(dx_TI + (pm * BM).to(tl.int64) * I, row, I, i, acc, kept)


@triton.jit
def store_halves(target, acc, row, col, BM: tl.constexpr, BN: tl.constexpr):
    """Store a tile as two halves: the staging buffer of a whole one would not fit beside the pipeline's."""
    left, right = tl.split(tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)))
    target.store([row, col], left.to(target.dtype))
    target.store([row, col + BN // 2], right.to(target.dtype))


@triton.jit(do_not_specialize=[*SIZES, "programs"])
def forward_tma(
    x_TI, w_OI, h_TP, b_OP, bias, mask_out, y_TO, T, i_units, o_units, p_units, programs,
    BIAS: tl.constexpr, MASK_OUT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    BP: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """`forward` without input mask, one program a multiprocessor; all operands but bias and mask are descriptors."""
    I, O, P = i_units * 8, o_units * 8, p_units * 16
    num_rows, num_cols = tl.cdiv(T, BM), tl.cdiv(O, BN)
    for number in tl.range(tl.program_id(0), num_rows * num_cols, programs, flatten=True):
        pm, pn = tile_of(number, num_rows, num_cols, GROUP)
        row, col = pm * BM, pn * BN
        acc = tl.zeros((BM, BN), tl.float32)
        for step in range(tl.cdiv(I, BK)):
            acc = tl.dot(x_TI.load([row, step * BK]), w_OI.load([col, step * BK]).T, acc)
        for step in range(tl.cdiv(P, BP)):
            acc = tl.dot(h_TP.load([row, step * BP]), b_OP.load([col, step * BP]).T, acc)
        acc = with_bias_and_mask(acc, bias, mask_out, col + tl.arange(0, BN), O, BIAS, MASK_OUT)
        store_halves(y_TO, acc, row, col, BM, BN)


@triton.jit(do_not_specialize=[*SIZES, "programs"])
def backward_tma(
    dy_TO, w_OI, ts_TP, a_PI, mask_in, dx_TI, T, i_units, o_units, p_units, programs,
    MASK_IN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BP: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """`backward` without output mask, one program a multiprocessor; all operands but the mask are descriptors."""
    I, O, P = i_units * 8, o_units * 8, p_units * 16
    num_rows, num_cols = tl.cdiv(T, BM), tl.cdiv(I, BN)
    for number in tl.range(tl.program_id(0), num_rows * num_cols, programs, flatten=True):
        pm, pn = tile_of(number, num_rows, num_cols, GROUP)
        row, col = pm * BM, pn * BN
        acc = tl.zeros((BM, BN), tl.float32)
        for step in range(tl.cdiv(O, BK)):
            acc = tl.dot(dy_TO.load([row, step * BK]), w_OI.load([step * BK, col]), acc)
        for step in range(tl.cdiv(P, BP)):
            acc = tl.dot(ts_TP.load([row, step * BP]), a_PI.load([step * BP, col]), acc)
        if MASK_IN:
            acc *= load_vector(mask_in, col + tl.arange(0, BN), I)[None, :]
        store_halves(dx_TI, acc, row, col, BM, BN)
