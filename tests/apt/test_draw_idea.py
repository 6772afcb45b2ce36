"""The top of the README: its picture comes from a run's records alone, its table has the columns that a run prints."""

import importlib.util
import io
import sys
from pathlib import Path
from typing import Any

import pytest
from pages import ROOT, blocks
from run_records import whole_run

from apt.files.whole import write_json
from apt.runs.report import print_report
from apt.runs.report.records import load_run


@pytest.fixture(scope="module")
def script() -> Any:
    """The script as a module."""
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("draw_idea", ROOT / "docs/draw_idea.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of two layers whose one event halves them, takes ranks from 8 to 11 and makes a step twice as fast."""
    folder = whole_run(tmp_path / "run")
    timings = {"sentences": 4, "tokens": 8, "steps": 3, "events": [{"step": 10, "ratio": 2.0}]}
    write_json(folder / "event_timing.json", timings)
    return folder


def test_the_panels_show_what_was_recorded(script: Any, run: Path) -> None:
    record = load_run(run)
    assert script.kept_by_layer(record) == [[1.0, 0.5], [1.0, 0.5]]
    assert script.ranks_by_layer(record) == [[8.0, 11.0], [8.0, 11.0]]
    assert script.times_left(record) == [1.0, 0.5]


def test_the_same_run_gives_the_same_picture(script: Any, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = [run / "first.svg", run / "second.svg"]
    for picture in pictures:
        monkeypatch.setattr(sys, "argv", ["draw_idea.py", str(run), "--out", str(picture)])
        script.main()
    assert pictures[0].read_bytes() == pictures[1].read_bytes()


def test_the_table_on_the_readme_has_the_columns_that_a_run_prints(tmp_path: Path) -> None:
    printed = io.StringIO()
    print_report(whole_run(tmp_path / "run"), printed)
    quoted = blocks((ROOT / "README.md").read_text(encoding="utf-8"), "text")[0].code
    title, _, columns = quoted.splitlines()[:3]
    lines = [line.strip() for line in printed.getvalue().splitlines()]
    assert title in lines
    assert columns in lines
