"""Triton kernels of the rank-R pieces: passes over x and dy that are bound by memory, and their ordered reductions.

No float atomics: every sum over programs is written as partial sums and added in a fixed order. Sizes and strides are
run-time arguments, so neither a new rank nor a new token count compiles anew.

Sizes come in units whose multiple the compiler can prove: ``I = i_units * UNIT``, ``P = p_units * 16``, ``z_units`` the
row stride of z and ts in 16 elements (a group of layers keeps theirs side by side).

Dimension key: T tokens, I in, O out, R rank, P rank padded to a multiple of 16.
"""

import triton
import triton.language as tl

from apt_kernels.loads import dot, load_tile, load_vector, store_tile

SIZES = ["T", "i_units", "o_units", "R", "p_units", "z_units", "seed"]


@triton.jit
def row_factor(gate_TR, rows, cols, T, R, P, seed, dropout, GATE: tl.constexpr, DROP: tl.constexpr):
    """``gate[t, r] * keep[t, r]`` of a tile: what multiplies the rank-R product row by row."""
    inside = (rows[:, None] < T) & (cols[None, :] < R)
    factor = tl.where(inside, 1.0, 0.0)
    if GATE:
        factor = load_tile(gate_TR, rows.to(tl.int64), R, cols, inside)
    if DROP:
        # Drawn from the seed and the place, so backward draws the same and no mask is kept.
        drawn = tl.rand(seed, rows[:, None] * P + cols[None, :])
        factor = tl.where(drawn >= dropout, factor / (1.0 - dropout), 0.0)
    return factor


@triton.jit
def times_vectors(tile, row_by, col_by, i, j, rows, cols, ROW_BY: tl.constexpr, COL_BY: tl.constexpr):
    """``tile[i, j] * row_by[i] * col_by[j]``, each where it is there."""
    if ROW_BY:
        tile *= load_vector(row_by, i, rows)[:, None]
    if COL_BY:
        tile *= load_vector(col_by, j, cols)[None, :]
    return tile


@triton.jit(do_not_specialize=["rows", "cols", "out_rows", "out_units", "stride"])
def pack(
    source, target, row_by, col_by, scale, rows, cols, out_rows, out_units, stride,
    ROW_BY: tl.constexpr, COL_BY: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """``target[i, j] = scale * row_by[i] * source[i, j] * col_by[j]`` in the dtype of the target, zeros around it.

    The small operands A and B take the masks, the rank gate and the scale, so that no large tensor has to.
    """
    out_cols = out_units * 8
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    j = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = (i[:, None] < rows) & (j[None, :] < cols)
    value = load_tile(source, i, stride, j, inside) * scale
    value = times_vectors(value, row_by, col_by, i, j, rows, cols, ROW_BY, COL_BY)
    store_tile(target, i, out_cols, j, value, (i[:, None] < out_rows) & (j[None, :] < out_cols))


@triton.jit(do_not_specialize=[*SIZES, "x_units", "a_units"])
def down(
    x_TI, a_PI, gate_TR, z_TP, h_TP, T, i_units, R, p_units, x_units, a_units, seed, dropout,
    ROWS: tl.constexpr, GATE: tl.constexpr, DROP: tl.constexpr, UNIT: tl.constexpr, WIDEN: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """``z = x A^T``; where ROWS, also ``h = z * gate * keep``. A program owns BM tokens and walks over all inputs."""
    I, P, stride = i_units * UNIT, p_units * 16, x_units * UNIT
    first = tl.program_id(0) * BM
    rows = tl.arange(0, BM)
    cols = tl.program_id(1) * BR + tl.arange(0, BR)
    x_TI += first.to(tl.int64) * stride
    live = tl.where(first + rows < T, rows, 0)  # rows past the end read the first one and are not stored
    acc = tl.zeros((BM, BR), tl.float32)
    for start in range(0, I, BK):
        k = start + tl.arange(0, BK)
        x = tl.load(x_TI + live[:, None] * stride + k[None, :], mask=k[None, :] < I, other=0.0)
        a = tl.load(
            a_PI + cols[:, None] * (a_units * 8) + k[None, :], mask=(cols[:, None] < P) & (k[None, :] < I), other=0.0
        )
        acc = dot(x, a.T, acc, WIDEN, PRECISION)
    kept = (first + rows[:, None] < T) & (cols[None, :] < P)
    place = (first + rows).to(tl.int64)
    z = acc.to(z_TP.dtype.element_ty)
    store_tile(z_TP, place, P, cols, z, kept)
    if ROWS:
        factor = row_factor(gate_TR, first + rows, cols, T, R, P, seed, dropout, GATE, DROP)
        store_tile(h_TP, place, P, cols, z.to(tl.float32) * factor, kept)


@triton.jit(do_not_specialize=[*SIZES, "dy_units", "rows_each", "start", "stop", "first_split"])
def up_backward(
    dy_TO, b_OP, z_TP, gate_TR, t_NTP, db_SOP, T, o_units, R, p_units, z_units, dy_units, seed, dropout,
    start, stop, rows_each, first_split, ROWS: tl.constexpr, GATE: tl.constexpr, DROP: tl.constexpr,
    UNIT: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """One read of dy: partial ``t = dy B`` per block of outputs, partial ``dB = dy^T h`` per slice of the tokens.

    It covers tokens start to stop; `t_NTP` has a row for each of these, `db_SOP` one slice a program along axis 1.
    """
    O, P, stride = o_units * UNIT, p_units * 16, dy_units * UNIT
    block, split = tl.program_id(0), tl.program_id(1)
    out = block * BN + tl.arange(0, BN)
    cols = tl.program_id(2) * BR + tl.arange(0, BR)
    own = (out[:, None] < O) & (cols[None, :] < P)
    b = tl.load(b_OP + out[:, None] * P + cols[None, :], mask=own, other=0.0)
    acc = tl.zeros((BN, BR), tl.float32)
    begin = start + split * rows_each
    end = tl.minimum(begin + rows_each, stop)
    for m in range(begin, end, BM):
        rows = m + tl.arange(0, BM)
        live = rows[:, None] < end
        dy = tl.load(
            dy_TO + rows[:, None].to(tl.int64) * stride + out[None, :], mask=live & (out[None, :] < O), other=0.0
        )
        z_place = rows[:, None].to(tl.int64) * (z_units * 16) + cols[None, :]
        z = tl.load(z_TP + z_place, mask=live & (cols[None, :] < P), other=0.0)
        if ROWS:
            factor = row_factor(gate_TR, rows, cols, T, R, P, seed, dropout, GATE, DROP)
            z = (z.to(tl.float32) * factor).to(z.dtype)
        t = dot(dy, b, None, WIDEN, PRECISION)
        place = (block * (stop - start) + rows[:, None] - start).to(tl.int64) * P + cols[None, :]
        tl.store(t_NTP + place, t, mask=live & (cols[None, :] < P))
        acc = dot(dy.T, z, acc, WIDEN, PRECISION)
    tl.store(db_SOP + ((first_split + split) * O + out[:, None]) * P + cols[None, :], acc, mask=own)


@triton.jit(do_not_specialize=[*SIZES, "num_parts", "start", "stop", "first_block"])
def rank_gradient(
    t_NTP, z_TP, gate_R, gate_TR, ts_TP, dgate_TR, dgate_MP, T, R, p_units, z_units, seed, dropout, num_parts,
    start, stop, first_block, RANK_GATE: tl.constexpr, GATE: tl.constexpr, DROP: tl.constexpr, NEEDS: tl.constexpr,
    BM: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Add the partials of t in order; write ``ts = t * gate * keep`` and, where NEEDS, the gate's gradient ``t * z``.

    A gate per row gets its gradient in `dgate_TR`; a gate per rank a partial sum per program in `dgate_MP`.
    """
    P = p_units * 16
    rows = start + tl.program_id(0) * BM + tl.arange(0, BM)
    cols = tl.program_id(1) * BR + tl.arange(0, BR)
    live = (rows[:, None] < stop) & (cols[None, :] < P)
    acc = tl.zeros((BM, BR), tl.float32)
    for part in range(num_parts):
        place = (part * (stop - start) + rows[:, None] - start).to(tl.int64) * P + cols[None, :]
        acc += tl.load(t_NTP + place, mask=live, other=0.0)
    place = rows.to(tl.int64)
    keep = row_factor(gate_TR, rows, cols, T, R, P, seed, dropout, False, DROP)
    if NEEDS:
        grad = acc * keep * load_tile(z_TP, place, z_units * 16, cols, live)
        if GATE:
            store_tile(dgate_TR, place, R, cols, grad, live & (cols[None, :] < R))
        else:
            own = (first_block + tl.program_id(0)) * P + cols
            tl.store(dgate_MP + own, tl.sum(tl.where(live, grad, 0.0), 0), mask=cols < P)
    factor = row_factor(gate_TR, rows, cols, T, R, P, seed, dropout, GATE, DROP)
    if RANK_GATE:
        factor *= load_vector(gate_R, cols, R)[None, :]
    store_tile(ts_TP, place, z_units * 16, cols, acc * factor, live)


@triton.jit(do_not_specialize=[*SIZES, "x_units", "rows_each"])
def down_backward(
    x_TI, ts_TP, da_SPI, T, i_units, p_units, x_units, rows_each,
    UNIT: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """One read of x: partial ``dA = ts^T x`` per slice of the tokens."""
    I, P, stride = i_units * UNIT, p_units * 16, x_units * UNIT
    split = tl.program_id(1)
    k = tl.program_id(0) * BK + tl.arange(0, BK)
    cols = tl.program_id(2) * BR + tl.arange(0, BR)
    acc = tl.zeros((BR, BK), tl.float32)
    end = tl.minimum((split + 1) * rows_each, T)
    for m in range(split * rows_each, end, BM):
        rows = m + tl.arange(0, BM)
        live = rows[:, None] < end
        x = tl.load(x_TI + rows[:, None].to(tl.int64) * stride + k[None, :], mask=live & (k[None, :] < I), other=0.0)
        ts = tl.load(ts_TP + rows[:, None].to(tl.int64) * P + cols[None, :], mask=live & (cols[None, :] < P), other=0.0)
        acc = dot(ts.T, x, acc, WIDEN, PRECISION)
    own = (cols[:, None] < P) & (k[None, :] < I)
    tl.store(da_SPI + (split * P + cols[:, None]) * I + k[None, :], acc, mask=own)


@triton.jit(do_not_specialize=["num_parts", "rows", "cols", "part_rows", "part_cols"])
def reduce(
    parts, target, row_by, col_by, scale, num_parts, rows, cols, part_rows, part_cols,
    ROW_BY: tl.constexpr, COL_BY: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """``target[i, j] = scale * row_by[i] * col_by[j] * sum_p parts[p, i, j]``, the parts added in their order."""
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    j = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = (i[:, None] < rows) & (j[None, :] < cols)
    acc = tl.zeros((BM, BN), tl.float32)
    for part in range(num_parts):
        place = (part * part_rows + i[:, None]).to(tl.int64) * part_cols + j[None, :]
        acc += tl.load(parts + place, mask=inside, other=0.0)
    total = times_vectors(acc * scale, row_by, col_by, i, j, rows, cols, ROW_BY, COL_BY)
    store_tile(target, i, cols, j, total, inside)
