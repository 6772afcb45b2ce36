"""Tile sizes of the kernels: at most six a kernel and machine, all compiled ahead by the tests.

Register and shared-memory use decided what stands here (kernels.md 4): nothing spills, everything fits.
"""

from typing import Any, NamedTuple

import torch


class Tiles(NamedTuple):
    """Rows, columns and inner step of a program's tile, its warps and the stages of its pipeline."""

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int


PRODUCT = {  # of forward, one_kernel and backward, from large to small
    "sm_90": (Tiles(128, 256, 64, 8, 3), Tiles(128, 128, 64, 8, 3), Tiles(64, 128, 64, 4, 3)),
    "sm_100": (Tiles(128, 128, 64, 8, 3), Tiles(64, 128, 64, 4, 3)),  # 128 x 256 spills, by descriptors too
    "sm_80": (Tiles(128, 128, 32, 8, 4), Tiles(64, 128, 32, 4, 4)),
    "sm_89": (Tiles(128, 128, 32, 8, 4), Tiles(64, 128, 32, 4, 4)),
    "gfx942": (Tiles(128, 128, 64, 8, 2), Tiles(64, 128, 64, 4, 2)),
    "interpreter": (Tiles(32, 32, 32, 4, 1),),
}
# Exact float32 runs without tensor cores, and loads of one element a time take many registers: both want small tiles.
PRODUCT_SMALL = (Tiles(64, 64, 32, 4, 3),)
PRODUCT_FLOAT32 = (Tiles(64, 64, 16, 8, 3),)
PRODUCT_TMA = (Tiles(128, 256, 64, 8, 3), Tiles(128, 128, 64, 8, 3))
TMA_RANK = 32  # ranks a step of the persistent kernels
GROUP = 8  # rows of tiles walked together

DOWN = {"interpreter": Tiles(32, 0, 32, 4, 1), "gfx942": Tiles(64, 0, 64, 4, 2), "": Tiles(64, 0, 64, 4, 3)}
UP_BACKWARD = {
    "interpreter": Tiles(32, 32, 0, 4, 1),
    "gfx942": Tiles(64, 128, 0, 4, 2),
    "sm_80": Tiles(64, 128, 0, 8, 3),  # with 4 warps it spills
    "sm_89": Tiles(64, 128, 0, 8, 3),
    "": Tiles(64, 128, 0, 4, 3),
}
DOWN_BACKWARD = {"interpreter": Tiles(32, 0, 32, 4, 1), "gfx942": Tiles(64, 0, 128, 4, 2), "": Tiles(64, 0, 128, 4, 3)}
SMALL = {  # the same three for float32 and for unaligned rows
    "down": Tiles(32, 0, 32, 4, 2),
    "up_backward": Tiles(16, 64, 0, 8, 2),
    "down_backward": Tiles(16, 0, 64, 4, 2),
}
ELEMENTWISE = Tiles(32, 128, 0, 4, 1)  # pack and reduce
RANK_GRADIENT_ROWS = 64
RANKS = (16, 64)  # columns of a rank block: 16 for small ranks, else 64; both are compiled at the first launch


def padded_rank(rank: int) -> Any:
    """The rank that z is stored with: a multiple of 16, at least 16."""
    return torch.sym_max(16, (rank + 15) // 16 * 16)  # max() would bind a traced rank to one side


def rank_block(padded_rank: int) -> int:
    """Columns of the rank-R product that one program owns."""
    return RANKS[0] if padded_rank <= RANKS[0] else RANKS[1]


def wants_small(arch: str, dtype: torch.dtype, unit: int) -> bool:
    return arch != "interpreter" and (dtype == torch.float32 or unit == 1)


def product(arch: str, dtype: torch.dtype, unit: int) -> tuple[Tiles, ...]:
    """The choices of the large products, from large to small. `unit` is what divides sizes and strides."""
    if wants_small(arch, dtype, unit):
        return PRODUCT_FLOAT32 if dtype == torch.float32 else PRODUCT_SMALL
    return PRODUCT[arch]


def one_kernel_ranks(arch: str, dtype: torch.dtype) -> tuple[int, ...]:
    """The rank blocks of `one_kernel`: in float32 without tensor cores it holds no 64 ranks beside its tile."""
    return RANKS[:1] if wants_small(arch, dtype, 0) else RANKS


def fitting(choices: tuple[Tiles, ...], rows: int, cols: int, programs: int) -> Tiles:
    """The largest tile that still gives every multiprocessor one, else the smallest there is."""
    for tiles in choices:
        if -(-rows // tiles.BM) * -(-cols // tiles.BN) >= programs:
            return tiles
    return choices[-1]


def skinny(kernel: str, arch: str, dtype: torch.dtype, unit: int) -> Tiles:
    """Tiles of down, up_backward or down_backward."""
    if wants_small(arch, dtype, unit):
        return SMALL[kernel]
    table = {"down": DOWN, "up_backward": UP_BACKWARD, "down_backward": DOWN_BACKWARD}[kernel]
    return table.get(arch, table[""])
