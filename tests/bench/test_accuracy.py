"""The accuracy benchmark at toy size: what rivals cut, that looking on changes no run, and what its table says."""

import copy
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import tiny_bert, write_config

from apt.runs.config import load_config
from apt.surgery.put_in import CAPACITY
from bench import accuracy, arms, grid
from bench.accuracy import GRID, goal, series, table, time_to
from bench.grid import Cell, fill, hours, runs
from bench.rivals import cut
from bench.rows import append_row, read_rows
from bench.training import block_parameters, peft_lora

BATCHES = [{"input_ids": torch.arange(5, 21).view(2, 8), "attention_mask": torch.ones(2, 8), "labels": torch.arange(2)}]
BARE = {"label": "lora", "seed": "0", "arm": "lora", "overrides": "", "train_seconds": "10"}


@pytest.mark.parametrize("kind", ["tp-magnitude", "tp-taylor"])
def test_units_that_do_nothing_are_cut_and_logits_stay(kind: str) -> None:
    model: Any = tiny_bert().double()
    dead = [({0, 3}, set(range(0, 64, 2))), ({1, 2}, set(range(32)))]  # heads and neurons of each layer
    with torch.no_grad():
        for layer, (heads, neurons) in zip(model.bert.encoder.layer, dead, strict=True):
            rows = [8 * head + row for head in heads for row in range(8)]
            one = layer.attention.self
            for linear in (one.query, one.key, one.value):
                linear.weight[rows], linear.bias[rows] = 0.0, 0.0
            layer.attention.output.dense.weight[:, rows] = 0.0
            layer.intermediate.dense.weight[list(neurons)], layer.intermediate.dense.bias[list(neurons)] = 0.0, 0.0
            layer.output.dense.weight[:, list(neurons)] = 0.0
    whole, total = copy.deepcopy(model), block_parameters(model)
    cut(model, kind, 0.45, BATCHES)
    inputs = {key: value for key, value in BATCHES[0].items() if key != "labels"}
    assert 0.45 <= 1.0 - block_parameters(model) / total < 0.47
    assert [layer.attention.self.num_attention_heads for layer in model.bert.encoder.layer] == [2, 2]
    with torch.no_grad():
        apart = (model.eval()(**inputs).logits - whole.eval()(**inputs).logits).abs().max()
    assert apart < 1e-9


def test_other_models_and_impossible_sizes_are_refused() -> None:
    model: Any = tiny_bert()
    with pytest.raises(ValueError, match="leaves no neuron beside 1 heads a layer"):
        cut(model, "tp-magnitude", 0.98, BATCHES)
    model.config.model_type = "roberta"
    with pytest.raises(ValueError, match="set up for BERT here, not for roberta"):
        cut(model, "tp-magnitude", 0.5, BATCHES)


def test_the_baseline_gets_nothing_of_a_patched_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in CAPACITY:
        monkeypatch.setenv(name, "1")  # put back after the test
        monkeypatch.delenv(name)
    peft_lora(tiny_bert(), load_config(write_config(tmp_path)))
    assert not any(name in os.environ for name in CAPACITY)


def test_a_course_changes_no_run(tmp_path: Path) -> None:
    config = write_config(tmp_path, training={"max_steps": 40})
    plain, watched = (arms.run(config, "apt-50", 0, [], points=points) for points in (0, 10))
    assert all(plain[name] == watched[name] for name in ("correct", "heads", "neurons", "ranks", "sparsity", "steps"))
    points = accuracy.course(watched)
    assert [seconds for seconds, _, _ in points] == sorted(seconds for seconds, _, _ in points)
    assert points[0][2] < points[-1][2] == watched["sparsity"]
    assert points[-1][1] == pytest.approx(watched["accuracy"], abs=1e-4)  # all test sentences are in it
    assert "course" not in plain


def test_a_tiny_grid_is_filled_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def here(*given: Any) -> dict[str, Any]:
        return arms.run(*given) | {"run_seconds": 5.0}

    for module in (grid, arms):
        monkeypatch.setattr(module, "run_apart", here)
    monkeypatch.setattr(arms, "SCRATCH", tmp_path / "scratch")
    config, out = write_config(tmp_path, training={"max_steps": 25}), tmp_path / "accuracy.csv"
    labels = ("full", "lora", "apt-60", "prune-60", "tp-taylor-60")
    cells = {label: Cell(GRID[label].arm, GRID[label].overrides) for label in labels}
    fill(out, config, cells, None, [], points=2)
    rows = {row["label"]: row for row in read_rows(out)}
    assert tuple(rows) == labels
    sizes = {label: float(row["sparsity"]) for label, row in rows.items()}
    assert sizes["full"] == sizes["lora"] == 0.0
    assert all(0.6 <= sizes[label] < 0.66 for label in labels[2:])
    lora, rival = rows["lora"], rows["prune-60"]
    assert float(rival["steps"]) == 2 * float(lora["steps"])
    sums = float(lora["train_seconds"]) + float(rival["retrain_seconds"])
    assert float(rival["train_seconds"]) == pytest.approx(sums, abs=0.02)
    assert accuracy.course(rival)[0][0] > float(lora["train_seconds"])

    took = {label: row.get("lora_cpu_seconds") for label, row in rows.items()}
    assert took == dict.fromkeys(labels, lora["train_cpu_seconds"]) | {"full": ""}  # it came before LoRA
    assert accuracy.over_lora(rival, []) == float(rival["train_cpu_seconds"]) / float(lora["train_cpu_seconds"])

    text = table(list(rows.values()))
    assert text.count("\n|") == 1 + len(GRID)
    assert f"\n{len(labels)} of {len(runs(GRID))} runs done in " in text
    assert text.count("| unmeasured |") == len(GRID) - len(labels)
    monkeypatch.setattr(grid, "run_apart", lambda *given: pytest.fail("a run that is there was done again"))
    fill(out, config, cells, None, [])
    with pytest.raises(SystemExit, match="with other settings, ''; name another --out"):
        fill(out, config, cells, None, ["training.epochs=1"])


def test_apt_is_compared_at_the_sparsities_that_both_have() -> None:
    def row(label: str, right: int, seconds: int) -> dict[str, str]:
        bits = np.packbits(np.arange(1000) < right).tobytes().hex()
        return BARE | {"label": label, "correct": bits, "test_size": "1000", "train_cpu_seconds": str(seconds)}

    mine = [row("apt-60 alone", 900, 10), row("apt-80 alone", 800, 10), row("apt-90 alone", 0, 10)]
    theirs = [row("prune-60", 800, 20), row("prune-80", 700, 40), row("tp-taylor-60", 900, 30)]
    *_, prune, taylor = accuracy.beside_apt([*mine, *theirs, row("lora", 0, 20)])
    assert prune.startswith("| LoRA, pruned at once, LoRA | 60 %, 80 % | +10.00 | +")
    assert prune.endswith(" | 3.00 |")  # the mean of 2 and 4
    assert taylor == "| the same by Torch-Pruning, Taylor | 60 % | +0.00 | +0.00 to +0.00 | 3.00 |"
    assert accuracy.beside_apt(mine) == []
    assert accuracy.beside_apt([*mine, *theirs])[-1].endswith("| unmeasured |")  # there is no LoRA


def test_the_hours_of_a_grid_come_from_the_rows_most_like_each_run(tmp_path: Path) -> None:
    cells = {"lora": Cell("lora", seeds=2), "apt-60": Cell("apt-60"), "apt-80": Cell("apt-80"), "full": Cell("full")}
    assert runs(cells) == [("lora", 0), ("apt-60", 0), ("apt-80", 0), ("full", 0), ("lora", 1)]
    assert hours(cells, None, []) == "0 of 5 runs done in 0.00 h"
    append_row(tmp_path / "rows.csv", BARE | {"run_seconds": "3600"})
    append_row(tmp_path / "rows.csv", BARE | {"label": "apt-60", "arm": "apt-60", "run_seconds": "1800"})
    # LoRA as LoRA, APT at 80 % as at 60 %, full fine-tuning as the mean of both.
    expected = "2 of 5 runs done in 1.50 h; the rest takes about 2.25 h, the whole grid 3.75 h"
    assert hours(cells, None, read_rows(tmp_path / "rows.csv")) == expected


def test_the_time_to_a_goal_counts_at_the_final_size_only() -> None:
    full = BARE | {"label": "full", "course": "5.0:0.5:0.0 9.0:0.8:0.0"}
    assert goal([full]) == pytest.approx(0.97 * 0.8)
    mine = BARE | {"course": "1.0:0.9:0.0 2.0:0.7:0.6 3.0:0.78:0.6 4.0:0.81:0.6"}
    assert time_to(mine, 0.776) == 3.0
    assert time_to(mine, 0.9) is None
    assert goal([mine]) is None


def test_every_run_of_the_grid_has_its_place() -> None:
    assert sum(cell.seeds for cell in GRID.values()) == len(GRID) + 2 * len(accuracy.THREE)
    apt = {label for label in GRID if series(label) == "apt"}
    assert apt == {"w/o_Ap", "apt-40", "apt-60", "apt-70", "apt-80", "apt-90"}
    assert {label for label in GRID if not series(label)} == {"w/o_AT", "w/o_Ds", "uniform_growth"}
    assert series("apt-60 alone") == series("apt-40 alone") == "apt alone"
    assert series("tp-taylor-90") == "tp-taylor"
