"""Launchers of the rank-R passes: workspace, splits and tiles of each kernel in `lowrank.py`.

Dimension key: T tokens, I in, O out, R rank, P rank padded to a multiple of 16.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from apt_kernels import _triton, lowrank, tiles

WORKSPACE = 48 * 2**20  # bytes of partial sums of t at a time: more tokens are taken in chunks

Call = tuple[tuple[int, ...], tuple[Any, ...]]  # grid and arguments

_compiled: set[tuple[Any, ...]] = set()


@dataclass(frozen=True)
class Rows:
    """What multiplies the rank-R product row by row: a gate ``[T, R]`` or none, and dropout by its seed."""

    gate_TR: Tensor | None
    dropout: float
    seed: int

    @property
    def there(self) -> bool:
        return self.gate_TR is not None or self.dropout > 0.0

    @property
    def flags(self) -> dict[str, Any]:
        return {"GATE": self.gate_TR is not None, "DROP": self.dropout > 0.0}


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, tile: tiles.Tiles, ranks: tuple[int, ...] = tiles.RANKS, **meta: Any
) -> None:
    """Launch where there is anything to do. A kernel with a rank block compiles for all `ranks` the first time."""
    if meta.get("BR") in tiles.RANKS and is_first(kernel, args, tile, {**meta, "BR": None}):
        compile_only(kernel, grid, *args, tile=tile, ranks=ranks, **meta)
    if 0 not in grid:
        kernel[grid](*args, **meta, **options(tile))


def launch_fitting(
    kernel: Any,
    choices: tuple[tiles.Tiles, ...],
    target: Tensor,
    call: Callable[[tiles.Tiles], Call],
    ranks: tuple[int, ...] = tiles.RANKS,
    **meta: Any,
) -> None:
    """Launch with the tiles that fit. The first time all choices compile: other numbers of tokens will take them.

    Args:
        kernel: takes its tile as BM, BN, BK.
        choices: from large to small.
        target: the result.
        call: the grid and the arguments with given tiles.
        ranks: its rank blocks, where it has one.
        meta: the other constants.
    """
    rows, cols = target.shape
    tile = tiles.fitting(choices, rows, cols, _triton.programs(target.device))
    grid, args = call(tile)
    if is_first(kernel, args, choices, meta):
        for other in choices:
            other_grid, other_args = call(other)
            compile_only(kernel, other_grid, *other_args, tile=other, ranks=ranks, **meta, **blocks(other))
    launch(kernel, grid, *args, tile=tile, ranks=ranks, **meta, **blocks(tile))


def compile_only(
    kernel: Any, grid: tuple[int, ...], *args: Any, tile: tiles.Tiles, ranks: tuple[int, ...], **meta: Any
) -> None:
    """Compile what a launch would run, and where it has a rank block the same with every other."""
    for block in ranks if meta.get("BR") in tiles.RANKS else [None]:
        kernel.warmup(*args, grid=grid, **(meta if block is None else {**meta, "BR": block}), **options(tile))


def is_first(kernel: Any, args: tuple[Any, ...], choice: tuple[Any, ...], meta: dict[str, Any]) -> bool:
    """Whether nothing like it was compiled before; never in the interpreter, which compiles nothing."""
    if _triton.interpreted():
        return False
    kinds = tuple(getattr(arg.base if isinstance(arg, TensorDescriptor) else arg, "dtype", type(arg)) for arg in args)
    key = (kernel, kinds, choice, *meta.items(), triton.runtime.driver.active.get_current_device())
    if key in _compiled:
        return False
    _compiled.add(key)
    return True


def blocks(tile: tiles.Tiles) -> dict[str, int]:
    return {"BM": tile.BM, "BN": tile.BN, "BK": tile.BK}


def options(tile: tiles.Tiles) -> dict[str, int]:
    return {"num_warps": tile.warps, "num_stages": tile.stages}


def pack(
    source: Tensor,
    rows: int,
    cols: int,
    dtype: torch.dtype,
    *,
    scale: float = 1.0,
    row_by: Tensor | None = None,
    col_by: Tensor | None = None,
) -> Tensor:
    """``scale * row_by * source * col_by`` in a zeroed ``[rows, cols]`` of the dtype; cols a multiple of 8."""
    source = _triton.rows_contiguous(source)
    target = source.new_empty(rows, cols, dtype=dtype)
    sizes = (*source.shape, rows, cols // 8, source.stride(0))
    return _elementwise(lowrank.pack, source, target, scale, row_by, col_by, *sizes)


def reduce(
    parts: Tensor, rows: int, cols: int, dtype: torch.dtype, *, scale: float = 1.0,
    row_by: Tensor | None = None, col_by: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The parts ``[N, rows', cols']`` added in order, ``[rows, cols]`` of them, times scale, row and column factors.

    Columns are contiguous; the rows may be some of a larger tensor's.
    """
    target = parts.new_empty(rows, cols, dtype=dtype)
    sizes = (len(parts), rows, cols, parts.stride(0) // max(1, parts.stride(1)), parts.stride(1))
    return _elementwise(lowrank.reduce, parts, target, scale, row_by, col_by, *sizes)


def _elementwise(
    kernel: Any, source: Tensor, target: Tensor, scale: float, row_by: Tensor | None, col_by: Tensor | None, *sizes: int
) -> Tensor:
    """Launch `pack` or `reduce`, a program a tile of the target, which is returned."""
    tile = tiles.ELEMENTWISE
    launch(
        kernel, (triton.cdiv(target.shape[0], tile.BM), triton.cdiv(target.shape[1], tile.BN)),
        source, target, row_by, col_by, float(scale), *sizes,
        ROW_BY=row_by is not None, COL_BY=col_by is not None, BM=tile.BM, BN=tile.BN, tile=tile,
    )  # fmt: skip
    return target


def packed_a(a_RI: Tensor, dtype: torch.dtype, mask_in: Tensor | None = None) -> Tensor:
    """A, its columns times the input mask, as ``[P, I]`` with the inputs padded to a multiple of 8."""
    return pack(a_RI, tiles.padded_rank(a_RI.shape[0]), -(-a_RI.shape[1] // 8) * 8, dtype, col_by=mask_in)


def down(x_TI: Tensor, a_PI: Tensor, rank: int, rows: Rows) -> tuple[Tensor, Tensor]:
    """``z = x A^T`` as ``[T, P]``, and h: z times the row factors; the same tensor where there are none."""
    T, I = x_TI.shape
    P = a_PI.shape[0]
    z_TP = x_TI.new_empty(T, P)
    h_TP = torch.empty_like(z_TP) if rows.there else z_TP
    unit = _triton.unit(I, x_TI.stride(0))
    tile = tiles.skinny("down", _triton.arch(x_TI.device), x_TI.dtype, unit)
    block = tiles.rank_block(P)
    launch(
        lowrank.down, (triton.cdiv(T, tile.BM), triton.cdiv(P, block)),
        x_TI, a_PI, rows.gate_TR, z_TP, h_TP, T, I // unit, rank, P // 16, x_TI.stride(0) // unit, a_PI.stride(0) // 8,
        rows.seed, rows.dropout, ROWS=rows.there, **rows.flags, UNIT=unit, **arithmetic(x_TI.dtype),
        BM=tile.BM, BK=tile.BK, BR=block, tile=tile,
    )  # fmt: skip
    return z_TP, h_TP


def up_backward(
    dy_TO: Tensor, b_OP: Tensor, z_TP: Tensor, ts_TP: Tensor, rank: int, gate_R: Tensor | None, rows: Rows,
    *, needs_gate: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """One pass over dy: writes ``ts = gate * keep * (dy B)`` and returns partial sums of dB and the gate's gradient.

    Args:
        dy_TO: upstream gradient.
        b_OP: packed, with scale and output mask.
        z_TP: of forward, ``[T, P]``; it and `ts_TP` may be columns of a wider tensor.
        ts_TP: written.
        rank: R.
        gate_R: gate per rank, or None.
        rows: gate per row and dropout.
        needs_gate: whether the gate's gradient is asked for.

    Returns:
        partial dB ``[N, O, P]`` without scale, mask and rank gate; gradient of the gate ``[T, R]`` or ``[R]``, or None.
    """
    (T, O), P = dy_TO.shape, b_OP.shape[1]
    unit = _triton.unit(O, dy_TO.stride(0))
    tile = tiles.skinny("up_backward", _triton.arch(dy_TO.device), dy_TO.dtype, unit)
    block, blocks = tiles.rank_block(P), triton.cdiv(O, tile.BN)
    chunk = max(tile.BM, WORKSPACE // (4 * P * max(1, blocks)) // tile.BM * tile.BM)
    splits, rows_each = split(min(chunk, T), tile.BM, blocks, dy_TO.device)
    chunks = triton.cdiv(T, chunk)
    t_NTP = dy_TO.new_empty(blocks, min(chunk, T), P, dtype=torch.float32)
    db_SOP = dy_TO.new_empty(max(1, chunks) * splits, O, P, dtype=torch.float32)
    if not chunks:
        db_SOP.zero_()
    height = tiles.RANK_GRADIENT_ROWS
    per_row = rows.gate_TR is not None
    dgate_TR = torch.empty_like(rows.gate_TR) if needs_gate and rows.gate_TR is not None else None
    dgate_MP = None
    if needs_gate and not per_row:
        dgate_MP = dy_TO.new_zeros(max(1, chunks * triton.cdiv(min(chunk, T), height)), 1, P, dtype=torch.float32)
    for number in range(chunks):
        start, stop = number * chunk, min(T, (number + 1) * chunk)
        launch(
            lowrank.up_backward, (blocks, splits, triton.cdiv(P, block)),
            dy_TO, b_OP, z_TP, rows.gate_TR, t_NTP, db_SOP, T, O // unit, rank, P // 16, z_TP.stride(0) // 16,
            dy_TO.stride(0) // unit, rows.seed, rows.dropout, start, stop, rows_each, number * splits,
            ROWS=rows.there, **rows.flags, UNIT=unit, **arithmetic(dy_TO.dtype), BM=tile.BM, BN=tile.BN, BR=block,
            tile=tile,
        )  # fmt: skip
        launch(
            lowrank.rank_gradient, (triton.cdiv(stop - start, height), triton.cdiv(P, block)),
            t_NTP, z_TP, gate_R, rows.gate_TR, ts_TP, dgate_TR, dgate_MP, T, rank, P // 16, z_TP.stride(0) // 16,
            rows.seed, rows.dropout, blocks, start, stop, number * triton.cdiv(chunk, height),
            RANK_GATE=gate_R is not None, **rows.flags, NEEDS=needs_gate, BM=height, BR=block, tile=tiles.ELEMENTWISE,
        )  # fmt: skip
    if dgate_MP is not None:
        assert gate_R is not None
        return db_SOP, reduce(dgate_MP, 1, rank, gate_R.dtype)[0]
    return db_SOP, dgate_TR


def down_backward(x_TI: Tensor, ts_TP: Tensor) -> Tensor:
    """One pass over x: partial sums ``[S, P, I]`` of ``dA = ts^T x``."""
    (T, I), P = x_TI.shape, ts_TP.shape[1]
    unit = _triton.unit(I, x_TI.stride(0))
    tile = tiles.skinny("down_backward", _triton.arch(x_TI.device), x_TI.dtype, unit)
    block, blocks = tiles.rank_block(P), triton.cdiv(I, tile.BK)
    splits, rows_each = split(T, tile.BM, blocks, x_TI.device)
    da_SPI = x_TI.new_empty(splits, P, I, dtype=torch.float32)
    launch(
        lowrank.down_backward, (blocks, splits, triton.cdiv(P, block)),
        x_TI, ts_TP, da_SPI, T, I // unit, P // 16, x_TI.stride(0) // unit, rows_each,
        UNIT=unit, **arithmetic(x_TI.dtype), BM=tile.BM, BK=tile.BK, BR=block, tile=tile,
    )  # fmt: skip
    return da_SPI


def split(tokens: int, rows: int, blocks: int, device: torch.device) -> tuple[int, int]:
    """Slices of the tokens that fill the device, and the tokens of each: a function of shapes and device alone."""
    most = max(1, triton.cdiv(tokens, rows))
    splits = min(most, max(1, _triton.programs(device) // max(1, blocks)))
    return splits, triton.cdiv(most, splits) * rows


def arithmetic(dtype: torch.dtype) -> dict[str, Any]:
    return {"WIDEN": _triton.widened(dtype), "PRECISION": _triton.precision(dtype)}
