"""The benchmark of adapter methods at toy size: every arm runs, ours and PEFT's train as much, the grid goes on."""

import argparse
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import write_config

from bench import adapter_arms, adapter_steps, adapters
from bench.adapter_arms import ARMS
from bench.rows import read_rows
from bench.shapes import SHAPES, Shape, _bert, _deberta

TOY = Shape(_bert(32, 4, vocab=50), ("q", "v", "up"), batch=2, tokens=5, layers=2, of=3)
TOY_DEBERTA = Shape(_deberta(32, 4, vocab=50), ("q", "v", "up"), batch=2, tokens=5, layers=2, of=3)
PAIRS = [name for name in ARMS if f"peft {name}" in ARMS]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("adapters"), training={"max_steps": 12})


@functools.cache
def trained(config: Path, name: str) -> dict[str, Any]:
    return adapter_arms.run(config, name, 0, [])


@pytest.mark.parametrize("name", list(ARMS))
def test_an_arm_is_trained_and_measured(name: str, config: Path) -> None:
    row = trained(config, name)
    assert row["steps"] == 12
    assert 0.0 <= row["accuracy"] <= 1.0
    assert row["train_seconds"] > 0.0
    # At least what trains, in float32; PEFT saves a prompt without its network, AdaLoRA without masked ranks.
    saves_less = name in ("peft p_tuning", "peft adalora")
    assert row["file_bytes"] > (0 if saves_less else 4 * row["trainable"])
    assert row["learning_rate"] == (ARMS[name].learning_rate or 3e-3)


@pytest.mark.parametrize("name", PAIRS)
def test_ours_and_pefts_train_as_much(name: str, config: Path) -> None:
    ours, theirs = trained(config, name), trained(config, f"peft {name}")
    assert theirs["trainable_start"] == ours["trainable_start"]


def test_settings_of_a_method_are_not_overridden(config: Path) -> None:
    for override in ("adapter.l1_weight=0.1", "training.initial_rank=4", "model.method=gsa"):
        with pytest.raises(SystemExit, match="are those of bench/adapter_arms"):
            adapter_arms.run(config, "gsa", 0, [override])


def test_the_loss_of_pefts_adalora_has_its_penalty() -> None:
    plain = TOY.model(None)
    model = adapter_arms.prepared(ARMS["peft adalora"], plain, 100, TOY.targets)
    batch = TOY.inputs(plain, "cpu")
    output = model(**batch)
    alone = torch.nn.functional.cross_entropy(output.logits, batch["labels"])
    found = {name: p for name, p in model.named_parameters() if "lora_A" in name or "lora_B" in name}
    sides = [p if "lora_A" in name else p.T for name, p in found.items()]
    apart = torch.stack([(side @ side.T - torch.eye(len(side))).norm() for side in sides]).mean()
    assert apart > 1.0
    torch.testing.assert_close(output.loss, alone + 0.5 * apart)


def test_adalora_is_smaller_at_the_end(config: Path) -> None:
    row = trained(config, "adalora")
    assert row["ranks"] < adapter_arms.FIRST_RANK * 12
    assert row["ranks"] <= adapter_arms.RANK * 12
    assert row["trainable"] < row["trainable_start"]


def options(out: Path, **changes: Any) -> argparse.Namespace:
    settings = {"arms": ["lora", "peft lora"], "seeds": [0, 1], "shape": "", "runs": 2, "set": [], "out": out}
    return argparse.Namespace(**{**settings, **changes})


def test_a_grid_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []

    def fake(arm: str, seed: int, given: argparse.Namespace) -> dict[str, Any]:
        asked.append((arm, seed))
        if len(asked) == 3:
            raise SystemExit("killed")
        return {"arm": arm, "seed": seed, "shape": given.shape, "accuracy": 0.5, "overrides": " ".join(given.set)}

    monkeypatch.setattr(adapters, "run_apart", fake)
    out = tmp_path / "rows.csv"
    with pytest.raises(SystemExit, match="killed"):
        adapters.fill(options(out))
    adapters.fill(options(out))
    assert asked == [("lora", 0), ("peft lora", 0), ("lora", 1), ("lora", 1), ("peft lora", 1)]
    assert [(row["arm"], int(row["seed"])) for row in read_rows(out)] == [*asked[:2], *asked[3:]]
    with pytest.raises(SystemExit, match="holds lora with"):
        adapters.fill(options(out, set=["training.epochs=1"]))


def test_a_run_apart_gives_its_row_and_the_table(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapters.csv"
    adapters.main(["--arms", "lora", "--seeds", "0", "--config", str(config), "--out", str(out)])
    (row,) = read_rows(out)
    assert float(row["peak_mb"]) > 0.0
    assert out.with_suffix(".md").read_text(encoding="utf-8").splitlines()[2].startswith("| lora | 1 | ")
    with pytest.raises(SystemExit, match="lora, seed 0 failed"):
        adapters.main(["--arms", "lora", "--seeds", "0", "--config", "none.yaml", "--out", str(tmp_path / "x.csv")])


def test_the_table_pairs_sentences() -> None:
    row = {"shape": "", "trainable_start": "10", "trainable": "8", "train_cpu_seconds": "2", "peak_mb": "3"}
    row |= {"file_bytes": "4000", "test_size": "8", "seed": "0"}
    base = {**row, "arm": "peft lora", "accuracy": "1.0", "correct": "ff", "ranks": "", "active": ""}
    ours = {**row, "arm": "gsa", "accuracy": "0.5", "correct": "f0", "ranks": "6", "active": "5"}
    lines = adapters.table([base, ours]).splitlines()
    assert lines[2].startswith("| gsa | 1 | 0.5000 | -50.00, ")
    assert lines[2].endswith("| 10 | 8 | 5 of 6 | 2 | 3 | 4 |")
    assert lines[3].startswith("| peft lora | 1 | 1.0000 | +0.00, +0.00 to +0.00 |")


@pytest.mark.parametrize("name", list(ARMS))
def test_a_step_of_a_shape(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "toy", TOY)
    row = adapter_steps.measure(name, "toy", runs=5)
    assert "refused" not in row, row
    assert row["ms_p50"] > 0.0
    assert row["answer_ms"] > 0.0
    assert (row["over_peft"] == 1.0) == (name == adapters.BASELINE)
    assert row["over_plain"] > 0.0
    assert row["trainable_start"] > 0


def test_what_a_shape_cannot_do_is_a_row_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "toy", TOY_DEBERTA)
    rows = [adapter_steps.measure(name, "toy", runs=5) for name in ("prefix_tuning", "peft prefix_tuning", "p_tuning")]
    assert [bool(row.get("refused")) for row in rows] == [True, True, False]
    lines = adapters.table([{key: str(value) for key, value in row.items()} for row in rows]).splitlines()
    assert lines[0].startswith("toy, 2 of 3 layers, random weights; a training step beside peft lora's")
    assert any(line.startswith("| prefix_tuning | refused: patch_model: prefix tuning") for line in lines)


def test_the_shape_of_deberta_is_the_published_one() -> None:
    with torch.device("meta"):
        model: Any = SHAPES["deberta-v3-base"].build(12)
    assert sum(p.numel() for p in model.deberta.parameters()) == 183_831_552
