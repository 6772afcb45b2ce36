"""Other tiles for the three skinny kernels, each alone: judged against float64, then timed beside the one that runs.

Their tiles were chosen by registers and shared memory; which is fastest only a GPU tells. A tile is written as
``BM x BN x BK w warps s stages``, without what the kernel has not. `up_backward` is timed with the kernel that adds up
what it leaves, as a wider tile leaves less.

Dimension key: T tokens, I in, O out, P rank padded to a multiple of 16.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from apt_kernels import _triton
from apt_kernels.tiles import Tiles, padded_rank, rank_block
from bench.kernels.session import Session, normal, relative_error
from bench.timing import Call

ALLOWED = 1.2  # of the error of torch's own product in the dtype
FLOOR = {torch.float32: 1e-6, torch.bfloat16: 0.0}
# By kernel and columns of its rank block (tiles.RANKS): tiles that neither spill nor ask for too much on sm_90.
TILES: dict[tuple[str, int], tuple[Tiles, ...]] = {
    ("down", 16): (
        Tiles(64, 0, 128, 4, 4), Tiles(64, 0, 128, 4, 3), Tiles(64, 0, 128, 8, 4), Tiles(64, 0, 256, 8, 3),
        Tiles(128, 0, 64, 8, 4),
    ),
    ("down", 64): (Tiles(64, 0, 128, 4, 4), Tiles(64, 0, 128, 4, 3), Tiles(64, 0, 128, 8, 4), Tiles(128, 0, 64, 8, 4)),
    ("up_backward", 16): (
        Tiles(64, 256, 0, 8, 3), Tiles(64, 512, 0, 8, 3), Tiles(64, 256, 0, 8, 2), Tiles(64, 128, 0, 8, 3),
    ),
    ("up_backward", 64): (
        Tiles(64, 256, 0, 8, 3), Tiles(64, 256, 0, 8, 2), Tiles(64, 128, 0, 8, 3), Tiles(64, 128, 0, 4, 4),
    ),
    ("down_backward", 16): (
        Tiles(64, 0, 128, 4, 4), Tiles(64, 0, 256, 8, 3), Tiles(128, 0, 128, 8, 3), Tiles(64, 0, 256, 4, 3),
    ),
    ("down_backward", 64): (
        Tiles(64, 0, 128, 4, 4), Tiles(64, 0, 256, 8, 3), Tiles(128, 0, 128, 8, 3), Tiles(64, 0, 128, 8, 3),
    ),
}  # fmt: skip
KERNELS = ("down", "up_backward", "down_backward")


@dataclass(frozen=True, kw_only=True)
class SweepCase:
    """One kernel on the layer whose adapter it serves."""

    kernel: str
    tokens: int
    d_in: int
    d_out: int
    rank: int

    @property
    def name(self) -> str:
        return f"sweep {self.kernel} {self.d_in}x{self.d_out} T={self.tokens} r={self.rank}"

    @property
    def tiles(self) -> tuple[Tiles, ...]:
        return TILES[self.kernel, rank_block(padded_rank(self.rank))]

    def columns(self) -> dict[str, Any]:
        sizes = {"tokens": self.tokens, "d_in": self.d_in, "d_out": self.d_out, "rank": self.rank}
        return {"case": self.name, "op": self.kernel, "what": "sweep", **sizes}


def label(tile: Tiles) -> str:
    sizes = "x".join(str(size) for size in (tile.BM, tile.BN, tile.BK) if size)
    return f"{sizes} w{tile.warps} s{tile.stages}"


@contextmanager
def taking(tile: Tiles | None) -> Iterator[None]:
    """The skinny kernels take this tile, and compile for the rank at hand alone; None: the tile that runs."""
    from apt_kernels import passes

    with ExitStack() as stack:
        stack.enter_context(patch.object(passes, "is_first", lambda *_: False))
        if tile is not None:
            stack.enter_context(patch.object(passes.tiles, "skinny", lambda *_: tile))
        yield


def operands(case: SweepCase, make: Callable[..., Tensor]) -> dict[str, Tensor]:
    """What the three kernels take, made by `make(shape, over)`: values of variance 1 / over."""
    T, I, O, P = case.tokens, case.d_in, case.d_out, int(padded_rank(case.rank))
    given = {"x": make((T, I), 1), "dy": make((T, O), 1), "a": make((P, I), I), "b": make((O, P), P)}
    given["b"][:, case.rank :] = 0  # as packing leaves it
    return given | {"z": make((T, P), 1), "ts": make((T, P), 1)}


def launch(case: SweepCase, given: dict[str, Tensor]) -> list[Tensor]:
    """The results of one launch: z; or ts and dB; or dA."""
    from apt_kernels.passes import Rows, down, down_backward, up_backward

    plain = Rows(None, 0.0, 0)
    if case.kernel == "down":
        return [down(given["x"], given["a"], case.rank, plain)[0]]
    if case.kernel == "down_backward":
        return [down_backward(given["x"], given["ts"])]
    ts = torch.empty_like(given["ts"])
    parts, _ = up_backward(given["dy"], given["b"], given["z"], ts, case.rank, None, plain, needs_gate=False)
    return [ts, parts]


def products(case: SweepCase, given: dict[str, Tensor]) -> list[Tensor]:
    """The same by torch, in the dtype of what is given."""
    if case.kernel == "down":
        return [given["x"] @ given["a"].T]
    if case.kernel == "down_backward":
        return [given["ts"].T @ given["x"]]
    return [given["dy"] @ given["b"], given["dy"].T @ given["z"]]


def measure_sweep(case: SweepCase, session: Session) -> None:
    """Judge every tile, then time those that are right in turns."""
    reason = unavailable(session)
    if reason:
        session.write([case.columns() | {"implementation": "all tiles", "status": "unavailable", "note": reason}])
        return
    generator = session.generator(0)
    copies = [operands(case, lambda shape, over: normal(shape, session, generator, over)) for _ in range(2)]
    truth = products(case, {name: tensor.double() for name, tensor in copies[0].items()})
    eager = [relative_error(e, t) for e, t in zip(products(case, copies[0]), truth, strict=True)]
    calls: dict[str, list[Call]] = {}
    found: dict[str, dict[str, Any]] = {}
    for tile in (None, *case.tiles):
        name = "as it runs" if tile is None else label(tile)
        if session.skipped(case.name, name):
            continue
        try:
            row = _judge(case, tile, copies[0], truth, eager, session)
            session.synchronise()
        except Exception as error:
            session.failed(case.name, name, error, what="sweep", op=case.kernel)
            continue
        if row["status"] == "ok":
            found[name], calls[name] = row, [_call(case, tile, given) for given in copies]
        else:
            session.write([case.columns() | {"implementation": name} | row])
    times = session.clock.interleaved(calls)
    source = copies[0]["dy" if case.kernel == "up_backward" else "x"]
    read = source.numel() * source.element_size()
    for name, taken in times.items():
        row = case.columns() | {"implementation": name} | taken.columns() | found[name]
        row["ratio"] = round(taken.median / times["as it runs"].median, 4) if "as it runs" in times else ""
        session.write([row | {"value": round(read / taken.median / 1e6, 1), "unit": "GB/s"}])


def _call(case: SweepCase, tile: Tiles | None, given: dict[str, Tensor]) -> Call:
    def call() -> None:
        with taking(tile):
            launch(case, given)

    return call


def _judge(
    case: SweepCase, tile: Tiles | None, given: dict[str, Tensor], truth: list[Tensor], eager: list[float],
    session: Session,
) -> dict[str, Any]:  # fmt: skip
    with taking(tile):
        got = launch(case, given)
    # Partial sums, one a slice of the tokens, stand in the first dimension.
    got = [part.sum(0) if part.dim() == 3 else part for part in got]
    mine = [relative_error(g, t) for g, t in zip(got, truth, strict=True)]
    wrong = any(m > ALLOWED * e + FLOOR[session.dtype] for m, e in zip(mine, eager, strict=True))
    if (tile and label(tile)) in session.planted:
        wrong = True
    text = "; ".join(f"{m:.2e} (eager {e:.2e})" for m, e in zip(mine, eager, strict=True))
    return {"status": "wrong" if wrong else "ok", "error": f"{max(mine):.3e}", "note": text}


def unavailable(session: Session) -> str | None:
    """Why no tile can be tried here, in words; None where they can. In the interpreter their times mean nothing."""
    return _triton.why_unusable(torch.empty(0, device=session.device, dtype=session.dtype))
