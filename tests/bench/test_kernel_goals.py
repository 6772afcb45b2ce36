"""Every goal of the kernels is named, with what its rows say or as unmeasured; docs/gpu.md shows them all."""

from pathlib import Path
from typing import Any

import pytest

from bench import report
from bench.kernels import page
from bench.kernels.goals import goal_lines
from bench.kernels.rows_of_run import Rows
from bench.rows import append_rows, read_rows

ROOT = Path(__file__).parents[2]
LINEAR = {"status": "ok", "op": "masked_lora_linear", "layer": "square", "case": "linear square T=8192 r=16 plain"}
LINEAR |= {"tokens": "8192", "d_in": "4096", "d_out": "4096", "rank": "16", "dtype": "bfloat16"}
LINEAR |= {"device": "NVIDIA H200", "run": "now", "torch": "", "triton": "", "commit": ""}


def timed(implementation: str, ms: float, **more: Any) -> dict[str, str]:
    row = LINEAR | {"what": "forward+backward", "implementation": implementation, "median_ms": str(ms)}
    return row | {key: str(value) for key, value in more.items()}


def lines_of(goal: str, rows: list[dict[str, str]]) -> list[tuple[str, str]]:
    return [(line.by, line.verdict) for line in goal_lines(Rows(rows)) if line.goal == goal and line.figure is not None]


def test_each_of_the_twenty_is_named_and_without_rows_unmeasured() -> None:
    lines = goal_lines(Rows([]))
    assert list(dict.fromkeys(line.goal for line in lines)) == [f"G{number}" for number in range(1, 21)]
    assert {line.verdict for line in lines} == {"unmeasured"}
    assert not any("T 0" in line.what or "?" in line.what for line in lines)  # the sizes that would be measured


def test_a_goal_that_no_row_can_hold_names_the_tests_that_check_it() -> None:
    checked = [line.by for line in goal_lines(Rows([])) if line.by.startswith("tests: ")]
    paths = {text.split("`")[1] for text in checked}
    assert {line.goal for line in goal_lines(Rows([])) if line.by in checked} == {"G15", "G16", "G20"}
    assert all((ROOT / path).exists() for path in paths)


@pytest.mark.parametrize(
    ("goal", "rows", "said"),
    [
        ("G1", [timed("frozen", 1.0), timed("torch", 1.3), timed("split_cublas", 1.1)], [("split_cublas", "met")]),
        ("G1", [timed("frozen", 1.0), timed("torch", 1.3)], [("torch", "**missed**")]),
        ("G1", [timed("torch", 1.3)], []),
        ("G1", [timed("frozen", 1.0), timed("torch", 1.1, what="tune"), timed("torch", 1.1, what="sweep")], []),
        ("G4", [timed("peft same dtype", 1.2), timed("torch", 1.0)], [("torch", "met")]),
        ("G4", [timed("peft default", 1.2), timed("torch", 1.0)], [("torch", "**missed**")]),
        ("G19", [timed("all kernels", 0, op="compile", what="cold", value=61)], [("threads", "**missed**")]),
        ("G19", [timed("all kernels", 0, op="compile", what="warm", value=0.5)], [("threads", "met")]),
        ("G20", [timed("all kernels", 0, op="resources", what="spilled", value=0)], [("", "met")]),
        ("G20", [timed("all kernels", 0, op="resources", what="spilled", value=2)], [("", "**missed**")]),
    ],
)
def test_a_verdict_is_what_the_rows_say(goal: str, rows: list[dict[str, str]], said: list[tuple[str, str]]) -> None:
    assert lines_of(goal, rows) == said


def test_the_page_of_gpus_shows_every_goal_as_measured() -> None:
    text = (ROOT / "docs/gpu.md").read_text(encoding="utf-8")
    ((name, block),) = [(match[2], match[0]) for match in report.BLOCK.finditer(text)]
    assert name == report.KERNEL_GOALS
    assert page.section(ROOT / "bench/results") in block
    assert all(f"| G{number} |" in block for number in range(1, 21))


def test_the_latest_run_of_each_gpu_is_drawn(tmp_path: Path) -> None:
    old = [timed("frozen", 1.0), timed("torch", 1.3)]
    new = [row | {"run": "later"} for row in (timed("frozen", 1.0), timed("torch", 1.1))]
    append_rows(tmp_path / "nvidia-h200" / "kernels.csv", [*old, *new])
    assert len(read_rows(tmp_path / "nvidia-h200" / "kernels.csv")) == 4
    text = page.section(tmp_path)
    assert "#### nvidia-h200\n\ndevice NVIDIA H200," in text
    assert "| G1 | square, T 8192, rank 16, over frozen | <= 1.16 | 1.1 | torch | met |" in text
    assert "**missed**" not in text
