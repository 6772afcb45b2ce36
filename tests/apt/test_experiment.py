"""A grid: the runs it stands for, what stops it before it begins, one run that fails among others, and its tables."""

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import SHORT, efficiency_of, metrics_of, write_grid

from apt.cli import main
from apt.runs.experiment import cells, load_grid, run_experiment
from apt.runs.experiment.launch import Children, command, folder_of
from apt.runs.experiment.tables import arms_of, tables
from apt.runs.report.records import RunRecord


def names(path: Path) -> list[str]:
    return [cell.name for cell in cells(load_grid(path))]


def test_every_method_meets_every_seed_and_sparsities_those_that_prune(tmp_path: Path) -> None:
    path = write_grid(tmp_path, methods=["full", "lora", "apt"], sparsities=[0.6, 0.8], seeds=[0, 1])
    of_a_seed = ["full", "lora", "apt-60", "apt-80"]
    assert names(path) == [f"{name}-seed{seed}" for seed in (0, 1) for name in of_a_seed]
    by_name = {cell.name: cell.config for cell in cells(load_grid(path))}
    assert by_name["full-seed1"].model.target_modules is None
    assert by_name["full-seed1"].training.seed == 1
    assert by_name["apt-80-seed0"].pruning.target_sparsity == 0.8
    assert by_name["lora-seed0"].training.max_steps == 12


def test_ablations_are_of_apt_and_what_does_not_prune_comes_once(tmp_path: Path) -> None:
    methods = {"lora": {"prune": True}, "apt": {"training.learning_rate": 2.0e-3}}
    path = write_grid(tmp_path, methods=methods, sparsities=[0.6, 0.8], ablations=["full", "w/o_AT", "w/o_Ap"])
    assert names(path) == [
        f"{name}-seed0"
        for name in ("lora-60", "lora-80", "apt-60", "apt-60-wo_AT", "apt-wo_Ap", "apt-80", "apt-80-wo_AT")
    ]
    by_name = {cell.name: cell.config for cell in cells(load_grid(path))}
    assert not by_name["apt-60-wo_AT-seed0"].tuning.adaptive_rank_update
    assert by_name["apt-wo_Ap-seed0"].pruning.target_sparsity == 0.0
    assert [by_name[f"{name}-seed0"].training.learning_rate for name in ("apt-60", "lora-60")] == [2.0e-3, 3.0e-3]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"config": None}, "config is missing"),
        ({"seed": [1]}, "unknown key 'seed'; did you mean seeds"),
        ({"methods": ["lorra"]}, "methods has 'lorra'; there are apt, lora"),
        ({"ablations": ["w/o_A"]}, "ablations has 'w/o_A'"),
        ({"sparsities": 0.6}, "sparsities must be a list of numbers"),
        ({"sparsities": [1.5]}, "target_sparsity"),
        ({"seeds": []}, "seeds must be a list of whole numbers"),
        ({"settings": {"training.epoch": 1}}, "did you mean training.epochs"),
        ({"gpus": [torch.cuda.device_count()]}, "gpus names"),
    ],
)
def test_what_is_wrong_stops_it_before_it_begins(
    keys: dict[str, Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_grid(tmp_path, **keys)
    assert main(["experiment", str(path)]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "grid").exists()


def test_a_run_that_fails_stops_no_other_and_what_is_finished_is_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fails is a process of its own; what succeeds is run here, as below one is by accelerate."""
    broken, apart = {"data.datasets": str(tmp_path / "nowhere.csv")}, Children.run

    def run(children: Children, line: list[str], log: Path) -> int | None:
        return apart(children, line, log) if "nowhere.csv" in " ".join(line) else main(line[3:])

    monkeypatch.setattr(Children, "run", run)
    path = write_grid(tmp_path, methods={"apt": broken, "lora": {}}, sparsities=[0.5])
    assert main(["experiment", str(path)]) == 1
    said = capsys.readouterr().err
    assert "[1/2] apt-50-seed0 failed: " in said
    assert "nowhere.csv" in said
    assert "[2/2] lora-seed0 finished" in said
    assert metrics_of(tmp_path / "grid" / "lora-seed0")["seed"] == 0
    first = (tmp_path / "grid" / "lora-seed0" / "metrics.json").stat().st_mtime_ns
    path = write_grid(tmp_path, methods=["apt", "lora"], sparsities=[0.5])
    assert main(["experiment", str(path)]) == 0
    assert "2 runs, 1 of them finished" in capsys.readouterr().err
    assert (tmp_path / "grid" / "lora-seed0" / "metrics.json").stat().st_mtime_ns == first
    with (tmp_path / "grid" / "tradeoff.csv").open(encoding="utf-8", newline="") as file:
        arms = {row["arm"]: row for row in csv.DictReader(file)}
    assert set(arms) == {"apt-50", "lora"}
    assert float(arms["lora"]["score_over_lora"]) == 1.0
    folder = tmp_path / "grid" / "apt-50-seed0"
    ours = metrics_of(folder) | efficiency_of(folder)
    assert float(arms["apt-50"]["params_after"]) == ours["params_after"]
    text = (tmp_path / "grid" / "tables.md").read_text(encoding="utf-8")
    assert "## Beside lora" in text
    assert f"| apt-50 | {ours['accuracy']:.4f} | {ours['train_seconds']:,.1f} |" in text
    assert (tmp_path / "grid" / "report.html").exists()
    write_grid(tmp_path, methods=["lora"], settings={**SHORT, "training.max_steps": 13})
    assert main(["experiment", str(path)]) == 2
    assert "finished run of other settings (training.max_steps is 13" in capsys.readouterr().err


def record(label: str, seed: int, ablation: str = "full", **metrics: Any) -> RunRecord:
    metrics = {"metric": "accuracy", "seed": seed, "ablation": ablation, "sparsity": 0.0, **metrics}
    rest: dict[str, Any] = {"events": [], "timings": {}, "steps": [], "scores": [], "shapes": [], "config": ""}
    return RunRecord(folder=Path(), label=f"{label}-seed{seed}", metrics=metrics, **rest)


def test_ratios_are_over_the_seeds_that_both_have() -> None:
    runs = [record("lora", seed, accuracy=0.8, train_seconds=100.0 * (1 + seed)) for seed in (0, 1)]
    runs += [record("apt-60", 0, accuracy=0.78, train_seconds=60.0)]
    runs += [record("apt-60-wo_AT", 0, "w/o_AT", accuracy=0.77, train_seconds=54.0)]
    lora, apt60, _ = arms_of(runs)
    assert apt60.over(lora, "train_seconds") == pytest.approx(0.6)
    text = tables(arms_of(runs))
    assert "| apt-60 | 1 | 0.7800 | 60.0 |" in text
    assert "| lora | 2 | 0.8000 ± 0.0000 | 100.0 |" in text
    assert "| apt-60-wo_AT | apt-60 | 0.7700 | -1.00 | 90.0 |" in text


def test_each_gpu_gets_one_run_at_a_time_by_accelerate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    path = write_grid(tmp_path, methods=["lora"], seeds=[0, 1, 2], gpus=[0, 1])
    grid = load_grid(path)
    line = command(grid, cells(grid)[0], 1)
    assert line[:3] == [sys.executable, "-m", "accelerate.commands.launch"]
    assert line[line.index("--gpu_ids") + 1] == "1"
    assert line[line.index("-m", 3) :][:3] == ["-m", "apt", "train"]
    busy: list[int] = []
    seen: list[tuple[int, ...]] = []

    def run(_grid: Any, cell: Any, gpu: int, _children: Any) -> None:
        busy.append(gpu)
        seen.append(tuple(busy))
        folder = folder_of(cell)
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps({"metric": "accuracy", "accuracy": 0.5, "seed": 0}))
        busy.remove(gpu)

    monkeypatch.setattr("apt.runs.experiment.launch._run", run)
    assert run_experiment(path) == []
    assert len(seen) == 3
    assert all(len(set(gpus)) == len(gpus) <= 2 for gpus in seen)


def test_accelerate_really_starts_a_run(tmp_path: Path) -> None:
    """On this machine without its GPUs, if any: the command is what `command` makes for a GPU."""
    import subprocess

    grid = load_grid(write_grid(tmp_path, methods=["lora"], seeds=[3]))
    line = command(grid, cells(grid)[0], 0)
    line[line.index("--gpu_ids") : line.index("--gpu_ids") + 2] = ["--cpu"]
    finished = subprocess.run([*line, "hardware.device=cpu"], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert metrics_of(tmp_path / "grid" / "lora-seed3")["seed"] == 3
