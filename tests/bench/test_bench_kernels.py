"""The kernel benchmark at toy size: it runs whole, compares before it times, and draws its table from its rows."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from check import close

from apt_kernels import _triton, reference, selection
from bench.baselines import BASELINES, MASKED, Inputs
from bench.kernels import __main__ as command
from bench.kernels import session as sessions
from bench.kernels.group import OP as GROUP
from bench.kernels.group import GroupCase, judge_group
from bench.kernels.linear import MASKS, LinearCase, gradients, judge, make_frozen, make_inputs, measure, referenced
from bench.kernels.page import table
from bench.rows import read_rows
from bench.timing import Clock

CPU = ["--device", "cpu", "--quick"]
CASE = LinearCase(layer="square", tokens=24, d_in=16, d_out=20, rank=4)


@pytest.fixture
def eager_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without a GPU: the interpreter takes too long for a whole run."""
    monkeypatch.setattr(_triton, "interpreted", lambda: False)


def make_session(folder: Path, device: str = "cpu") -> sessions.Session:
    clock = Clock(torch.device(device), runs=2, warmup=1)
    facts = {"run": "now", "device": device, "torch": "", "triton": "", "commit": ""}
    return sessions.Session(torch.device(device), clock, folder / "kernels.csv", facts, float("inf"))


PAIRS = [(name, masks) for name in BASELINES for masks in MASKS if masks == "plain" or name in MASKED]


@pytest.mark.parametrize(("name", "masks"), PAIRS)
def test_every_baseline_computes_the_op(name: str, masks: str, tmp_path: Path) -> None:
    case = LinearCase(layer="square", tokens=24, d_in=16, d_out=20, rank=4, masks=masks)
    inputs: Inputs = make_inputs(case, make_session(tmp_path), 0)
    truth = gradients(referenced(make_frozen(inputs) if name == "frozen" else inputs), inputs.dy)
    for label, got, wanted in zip(("y", "dx", "da", "db"), gradients(BASELINES[name](inputs), inputs.dy), truth):  # noqa: B905
        close(f"{name} {label}", got, wanted)


def test_the_oracle_is_the_reference(tmp_path: Path) -> None:
    inputs = make_inputs(CASE, make_session(tmp_path), 0)
    y = reference.masked_lora_linear(inputs.x, inputs.weight, inputs.a, inputs.b, scale=inputs.scale)
    close("y", gradients(referenced(inputs), inputs.dy)[0], y)


def test_a_whole_run(tmp_path: Path, eager_only: None) -> None:
    assert command.main([*CPU, "--out", str(tmp_path)]) == 0
    rows = read_rows(tmp_path / "kernels.csv")
    assert {row["status"] for row in rows} <= {"ok", "done", "unavailable"}
    timed = [row for row in rows if row["status"] == "ok" and row["median_ms"]]
    assert {"frozen", "torch", *BASELINES} <= {row["implementation"] for row in timed}
    assert all(float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"]) for row in timed)
    text = (tmp_path / "kernels.md").read_text(encoding="utf-8")
    assert table(rows) == text
    assert all(f"| G{goal} |" in text for goal in range(1, 21))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kernels.csv", "kernels.md"]


def test_what_the_time_does_not_allow_is_unmeasured(tmp_path: Path, eager_only: None) -> None:
    assert command.main([*CPU, "--out", str(tmp_path), "--minutes", "0", "--only", "copy|square"]) == 0
    assert {row["status"] for row in read_rows(tmp_path / "kernels.csv")} == {"unmeasured"}
    assert "unmeasured, all: the time was up" in (tmp_path / "kernels.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("only", ["square T=64 r=4 plain$", "column_sums"])
def test_a_wrong_implementation_is_reported_and_not_timed(only: str, tmp_path: Path, eager_only: None) -> None:
    options = command.parse([*CPU, "--out", str(tmp_path), "--only", only])
    session = command.start(options)
    session.planted.add("torch")
    assert command.run(session, options) == 1
    mine = [row for row in read_rows(tmp_path / "kernels.csv") if row["implementation"] == "torch"]
    assert {row["status"] for row in mine} == {"wrong"}
    assert all(float(row["error"]) > 0.3 and not row.get("median_ms") for row in mine)
    assert "wrong, torch" in (tmp_path / "kernels.md").read_text(encoding="utf-8")


def test_an_implementation_that_raises_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(_: Any) -> Any:
        raise RuntimeError("a planted fault")

    monkeypatch.setattr(_triton, "interpreted", lambda: False)
    monkeypatch.setitem(BASELINES, "unsloth style", raises)
    assert command.main([*CPU, "--out", str(tmp_path), "--only", "square T=64 r=4 plain$"]) == 1
    rows = read_rows(tmp_path / "kernels.csv")
    assert next(row["note"] for row in rows if row["status"] == "failed") == "RuntimeError: a planted fault"
    assert any(row["implementation"] == "torch" and row["median_ms"] for row in rows)


def test_every_implementation_that_selection_lists_takes_part(tmp_path: Path, device: str) -> None:
    usable = judge(CASE, make_session(tmp_path, device))
    assert set(usable) == {*BASELINES, "torch", *selection.KERNELS["masked_lora_linear"]}


def test_every_implementation_of_a_group_takes_part(tmp_path: Path, device: str) -> None:
    case = GroupCase(tokens=24, d_in=16, d_out=20, rank=4, layers=3)
    assert set(judge_group(case, make_session(tmp_path, device))) == {"torch", *selection.KERNELS[GROUP]}


def test_what_the_design_never_runs_is_left_out_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "one_kernel" in judge(CASE, make_session(tmp_path))
    monkeypatch.setattr(selection, "ONE_KERNEL_OUTPUTS", CASE.d_out)
    session = make_session(tmp_path / "wide")
    assert "one_kernel" not in judge(CASE, session)
    assert [row["note"] for row in session.rows if row["status"] == "left out"] == [sessions.NEVER]
    assert sessions.split_off_never(["torch", "one_kernel"], 16, 64)[0] == ["torch"]  # a rank that is too high


def test_rows_hold_what_they_depend_on(tmp_path: Path, eager_only: None) -> None:
    session = make_session(tmp_path)
    measure(CASE, session)
    row = next(row for row in session.rows if row["implementation"] == "torch" and row["what"] == "forward+backward")
    sizes = {"tokens": "24", "d_in": "16", "d_out": "20", "rank": "4", "dtype": "float32", "device": "cpu"}
    assert sizes.items() <= row.items()
    assert float(row["ratio"]) > 0


def test_selection_reads_the_tuned_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, eager_only: None) -> None:
    assert command.main([*CPU, "--tune", "--out", str(tmp_path), "--only", "^linear|^group|column_sums"]) == 0
    written = json.loads(next(tmp_path.glob("*.json")).read_text(encoding="utf-8"))
    assert {"implementations", "device", "versions", "commit"} == set(written)
    key = selection.key("masked_lora_linear", torch.float32, (64, 32, 32, 2))
    monkeypatch.setattr(selection, "measured", lambda device: written["implementations"])
    assert key in written["implementations"]
    x = torch.randn(64, 32)
    assert selection.choose("masked_lora_linear", x, None, (64, 32, 32, 2)) == written["implementations"][key]
