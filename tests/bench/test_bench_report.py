"""Tables and pictures come from the rows alone, on a page whose own words stay; and what is left within the minutes."""

import argparse
from pathlib import Path
from typing import Any

import pytest

from bench import plan, plots
from bench.report import GOALS, TABLES, excerpt, rewrite, rewrite_results
from bench.rows import append_rows, environment

STEEP = [{"part": "search", "axis": "layers", "size": n, "ms_p50": n**1.5, "commit": "abc"} for n in (1, 10, 100)]
EVEN = [{"part": "gate", "axis": "tokens", "size": n, "ms_p50": 2 * n, "commit": "abc"} for n in (1, 10, 100)]


def texts(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    return [{key: str(value) for key, value in row.items()} for row in rows]


def test_the_page_shows_what_was_measured_and_keeps_its_own_words(tmp_path: Path) -> None:
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    blocks = [f"<!-- bench:{name} -->\nold\n<!-- /bench -->\nof {name}\n" for name in (*TABLES, GOALS)]
    page.write_text("first\n" + "".join(blocks))
    results = tmp_path / "bench" / "results"
    append_rows(results / "cpu" / "cost.csv", STEEP)
    rewrite_results(page, results)
    once = page.read_text(encoding="utf-8")
    rewrite_results(page, results)
    assert page.read_text(encoding="utf-8") == once
    assert once.startswith("first\n<!-- bench:train_step -->\n\nMeasure it with `python -m bench.train_step`")
    assert once.count("\n`unmeasured`\n") == len(TABLES) - 1
    assert "#### cpu\n\n| on one machine" in once
    assert all(f"<!-- /bench -->\nof {name}\n" in once for name in TABLES)
    assert "old" not in once
    assert "#### cpu, commit abc" in once
    assert "| search | layers | 100 | 1000.0 |" in once
    assert (page.parent / "../bench/results/cpu/cost.png").stat().st_size > 1000
    assert "![cost on cpu](../bench/results/cpu/cost.png)" in once


def test_a_page_without_the_marks_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- bench:cost -->\n<!-- /bench -->\n")
    with pytest.raises(ValueError, match="it needs one <!-- bench:NAME -->"):
        rewrite_results(page, tmp_path)


def test_readme_has_the_table_alone(tmp_path: Path) -> None:
    page, results = tmp_path / "README.md", tmp_path / "results"
    page.write_text("before\n<!-- bench:footprints -->\nold\n<!-- /bench -->\nafter\n")
    rewrite(page, ["footprints"], lambda name: excerpt(name, results))
    assert page.read_text() == "before\n<!-- bench:footprints -->\n\n`unmeasured`\n<!-- /bench -->\nafter\n"
    common = {"config": "c", "model": "m", "task": "t_u", "precision": "fp32", "sparsity": 0.6, "batch": 4, "tokens": 8}
    counted = [("LoRA", "before pruning", 5e9), ("APT", "before pruning", 6e9), ("APT", "after the last event", 25e8)]
    rows = [common | {"arm": arm, "phase": phase, "peak_bytes": int(size)} for arm, phase, size in counted]
    append_rows(results / "cpu" / "footprints.csv", rows)
    rewrite(page, ["footprints"], lambda name: excerpt(name, results))
    assert "\n| m, t u, fp32 | 4 x 8 | 60% | 5.00 | 6.00 | - | 2.50 |\n" in page.read_text()


def test_growth_worse_than_linear_is_named_in_red() -> None:
    figure = plots.cost(texts([*STEEP, *EVEN]))
    titles = {axis.get_title(): axis.title.get_color() for axis in figure.axes if axis.get_title()}
    assert titles == {"search: size to the 1.50, worse than linear": "tab:red", "gate: size to the 1.00": "black"}


def test_bars_are_as_long_as_the_latest_row_says() -> None:
    common = {"shape": "s", "dtype": "float32", "device": "cpu", "over_limit": 2.0}
    rows = [common | {"contestant": name, "over_peft": over} for name, over in (("peft lora", 1.0), ("full", 3.0))]
    figure = plots.train_step(texts([*rows, rows[1] | {"over_peft": 1.5}]))
    (axis,) = figure.axes
    assert [bar.get_width() for bar in axis.patches] == [1.5, 1.0]  # as they are listed, not as they came
    assert list(axis.lines[0].get_xdata()) == [0.75, 0.5]  # the limit
    assert list(axis.lines[1].get_xdata()) == [1.0, 1.0]  # PEFT's


def test_a_point_of_the_accuracy_picture_is_the_mean_of_its_seeds() -> None:
    common = {"train_cpu_seconds": 5, "speedup": 3}
    rows = [common | {"label": "lora", "sparsity": 0, "accuracy": a} for a in (0.8, 0.9)]
    rows += [common | {"label": f"apt-{p}", "sparsity": p / 100, "accuracy": 0.7} for p in (80, 60)]
    rows[-1] |= {"lora_cpu_seconds": 2}  # on a machine that was faster
    axis, times, _ = plots.accuracy(texts(rows)).axes
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines}
    assert lines["PEFT LoRA"] == ([0.0], [pytest.approx(0.85)])
    assert lines["APT with teacher"] == ([0.6, 0.8], [0.7, 0.7])
    assert [list(line.get_xdata()) for line in times.lines] == [[1.0], [2.5, 1.0]]


def test_what_this_commit_measured_is_left_out_and_what_the_time_forbids_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.csv"
    append_rows(out, [environment() | {"part": "gate"}, environment() | {"part": "search", "commit": "other"}])
    units = [{"part": "gate"}, {"part": "search"}]

    def left(**options: Any) -> list[dict[str, str]]:
        given = {"minutes": float("inf"), "resume": True, "out": out} | options
        return list(plan.todo(units, argparse.Namespace(**given)))

    assert left() == [{"part": "search"}]
    assert left(resume=False) == units
    assert left(minutes=0.0) == []
    assert capsys.readouterr().out == "unmeasured, the time was up: search\n"
