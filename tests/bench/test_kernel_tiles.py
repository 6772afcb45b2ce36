"""Tiles and profiles of the kernels, in Triton's interpreter: what is wrong or fails has no time; bytes are counted."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from apt_kernels import lowrank, passes, tiles
from apt_kernels.tiles import RANKS, Tiles
from bench.kernels import profile, sweep
from bench.kernels.linear import LinearCase
from bench.kernels.plan import FULL, TOY, profile_plan, sweep_cases
from bench.kernels.session import Session
from bench.kernels.sweep import KERNELS, TILES, SweepCase, label, measure_sweep
from bench.timing import Clock

pytest.importorskip("triton")
TINY = (Tiles(16, 0, 16, 4, 1), Tiles(32, 0, 16, 4, 1))


@pytest.fixture
def session(tmp_path: Path, device: str) -> Session:
    clock = Clock(torch.device(device), runs=2, warmup=1)
    facts = {"run": "now", "device": device, "torch": "", "triton": "", "commit": ""}
    return Session(torch.device(device), clock, tmp_path / "kernels.csv", facts, float("inf"))


def case(kernel: str, rank: int = 4) -> SweepCase:
    return SweepCase(kernel=kernel, tokens=40, d_in=24, d_out=32, rank=rank)


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_tile_is_judged_and_timed_beside_the_one_that_runs(kernel: str, session: Session) -> None:
    measure_sweep(case(kernel), session)
    rows = {row["implementation"]: row for row in session.rows}
    assert list(rows) == ["as it runs", *map(label, case(kernel).tiles)]
    assert {row["status"] for row in rows.values()} == {"ok"}
    assert float(rows["as it runs"]["ratio"]) == 1.0
    assert all(float(row["median_ms"]) > 0 and float(row["error"]) < 1e-5 for row in rows.values())


def test_the_tile_that_is_named_is_the_one_that_runs(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[Tiles] = []
    true = passes.launch

    def noting(kernel: Any, *args: Any, tile: Tiles, **meta: Any) -> None:
        launched.append(tile)
        true(kernel, *args, tile=tile, **meta)

    monkeypatch.setattr(passes, "launch", noting)
    before = tiles.skinny("down", "interpreter", torch.float32, 8)
    measure_sweep(case("down"), session)
    assert set(launched) == {before, *case("down").tiles}
    assert tiles.skinny("down", "interpreter", torch.float32, 8) == before


def test_a_wrong_tile_and_one_that_fails_are_rows_without_a_time(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong, fails = TINY
    monkeypatch.setitem(TILES, ("down", 16), (wrong, fails, Tiles(32, 0, 32, 4, 1)))
    true = sweep.launch

    def launch(case: SweepCase, given: dict[str, Tensor]) -> list[Tensor]:
        tile = tiles.skinny("down", "interpreter", torch.float32, 8)
        if tile == fails:
            raise RuntimeError("out of resource: planted")
        return [out * (1.5 if tile == wrong else 1.0) for out in true(case, given)]

    monkeypatch.setattr(sweep, "launch", launch)
    measure_sweep(case("down"), session)
    rows = {row["implementation"]: row for row in session.rows}
    assert [rows[label(tile)]["status"] for tile in (wrong, fails)] == ["wrong", "failed"]
    assert not any(rows[label(tile)].get("median_ms") for tile in (wrong, fails))
    assert rows[label(fails)]["note"] == "RuntimeError: out of resource: planted"
    assert rows["32x32 w4 s1"]["status"] == "ok"


def test_four_to_six_tiles_a_kernel_and_rank_block_and_none_that_runs_already() -> None:
    assert set(TILES) == {(kernel, block) for kernel in KERNELS for block in RANKS}
    for (kernel, _), tried in TILES.items():
        assert 4 <= len(set(tried)) == len(tried) <= 6
        assert tiles.skinny(kernel, "sm_90", torch.bfloat16, 8) not in tried
    assert {tiles.rank_block(int(tiles.padded_rank(each.rank))) for each in sweep_cases(FULL)} == set(RANKS)


def test_bytes_are_those_of_every_operand_once() -> None:
    x, y = torch.zeros(4, 8, dtype=torch.bfloat16), torch.zeros(8)

    class Described:
        base = y

    assert profile.operand_bytes((x, Described(), None, 3, 0.5)) == 4 * 8 * 2 + 8 * 4


def test_a_profile_has_a_row_a_kernel_with_time_and_count(session: Session) -> None:
    profile.profile_case(LinearCase(layer="square", tokens=24, d_in=16, d_out=20, rank=4), session)
    rows = session.rows
    assert {(row["what"], row["status"], row["implementation"]) for row in rows} == {("profile", "ok", "torch")}
    assert {"aten::mm", "aten::addmm_"} <= {row["kernel"] for row in rows}
    assert len(rows) <= profile.MOST
    # Both numbers are rounded to 0.01, so the product of a row is known to so much.
    least, most = ([(float(row["us"]) + off) * (float(row["calls"]) + off) for row in rows] for off in (-0.005, 0.005))
    assert all(more >= less for more, less in zip(most, least[1:], strict=False))


def test_kernels_of_ours_get_their_rate() -> None:
    launched = {"down": profile.Launches(count=2, moved=8_000_000)}
    down, other = profile._rows({"gemm": (3.0, 1.0), "down": (4.0, 2.0)}, launched)
    assert (down["kernel"], down["value"], down["unit"]) == ("down", 1000.0, "GB/s")  # 4 MB in 4 us
    assert "value" not in other


def test_a_profile_covers_one_case_of_each_op() -> None:
    names = [name for name, _ in profile_plan(TOY)]
    assert len(set(names)) == len(names)
    ops = ("linear square", "linear up", "linear encoder", "group 3", "gate 64", "gate collecting", "column_sums")
    for op in (*ops, "gated_activation", "masked_norm", "weight_kurtosis"):
        assert any(name.startswith(f"profile {op}") for name in names), op


def test_a_profile_that_fails_is_a_row(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(*_: Any) -> Callable[[], None]:
        raise RuntimeError("planted")

    monkeypatch.setattr(profile, "kernel_times", raises)
    profile.profile_case(LinearCase(layer="square", tokens=24, d_in=16, d_out=20, rank=4), session)
    assert [(row["status"], row["note"]) for row in session.rows] == [("failed", "RuntimeError: planted")]


def test_the_kernels_that_are_swept_are_those_of_the_table() -> None:
    assert all(hasattr(lowrank, kernel) and hasattr(passes, kernel) for kernel in KERNELS)
