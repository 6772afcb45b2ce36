"""The decoder benchmark at toy size: every arm trains, what is measured is the export, tables come from the rows."""

from pathlib import Path

import pytest
from tiny_text import write_text_config

from apt.runs.config import load_config
from bench.decoder import run, speed, speed_table, table

SETTINGS = {"max_steps": 20, "learning_rate": "1e-2"}


def test_arms_are_trained_and_measured(tmp_path: Path) -> None:
    config = write_text_config(tmp_path, training=SETTINGS)
    before = ["pruning.prune_before_tuning=true", "pruning.calibration_batches=2"]
    rows = {arm: run(config, arm, 0, before, tmp_path / arm) for arm in ("dense", "lora", "apt", "magnitude")}
    assert len({row["test_tokens"] for row in rows.values()}) == 1
    assert (rows["dense"]["steps"], rows["lora"]["steps"], rows["apt"]["steps"]) == (0, 20, 20)
    assert rows["lora"]["perplexity"] < rows["dense"]["perplexity"]
    assert rows["lora"]["perplexity_untuned"] == pytest.approx(rows["dense"]["perplexity"], rel=1e-5)
    untuned = {row["perplexity_untuned"] for arm, row in rows.items() if arm != "dense"}
    assert len(untuned) == 3  # of models that are pruned already, each in its way
    assert rows["lora"]["params"] == rows["dense"]["params"] > rows["apt"]["params"]
    assert (rows["lora"]["sparsity"], rows["dense"]["sparsity"]) == (0.0, 0.0)
    assert 0.3 <= rows["apt"]["sparsity"] <= 0.5
    assert all(len(row["text"]) > 10 for row in rows.values())

    lines = table([{key: str(value) for key, value in row.items()} for row in rows.values()]).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        f"| {arm} {' '.join(before)}" for arm in ("dense", "lora", "apt", "magnitude")
    ]

    times = speed(load_config(config), {"apt": tmp_path / "apt"}, runs=2)
    assert {(row["what"], row["arm"]) for row in times} == {
        ("generation", "dense"),
        ("generation", "apt"),
        ("training", "lora"),
        ("training", "apt"),
    }
    assert all(row["ratio_p50"] == 1.0 for row in times if row["arm"] in ("dense", "lora"))
    assert len(speed_table([{key: str(value) for key, value in row.items()} for row in times]).splitlines()) == 2 + 6


def test_perplexities_are_compared_with_lora_and_magnitude_pruning_of_the_same_seed() -> None:
    common = {"overrides": "", "params": "1000", "sparsity": "0.3", "train_cpu_seconds": "5"}
    rows = [
        {"arm": arm, "seed": seed, "perplexity": perplexity, "perplexity_untuned": "80", **common}
        for arm, seed, perplexity in [("apt", "0", "20"), ("magnitude", "0", "40"), ("apt", "1", "30")]
    ]
    rows += [{"arm": "lora", "seed": "1", "perplexity": "9", **common, "train_cpu_seconds": "10", "commit": commit}
             for commit in ("", "other")]  # fmt: skip
    cells = [line.split(" | ") for line in table(rows).splitlines()[2:]]
    assert [line[-1] for line in cells] == ["- |", "- |", "0.500 |", "1.000 |", "1.000 |"]
    assert [(line[0], *line[5:8]) for line in cells[:3]] == [
        ("| apt", "20.00", "nan", "0.500"),
        ("| magnitude", "40.00", "nan", "1.000"),
        ("| apt", "30.00", "3.333", "nan"),
    ]
