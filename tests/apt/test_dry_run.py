"""The dry run: every preset, the authors' schedules, a real run beside its plan, and what it refuses."""

import json
from pathlib import Path

import pytest
from tiny_run import write_config

from apt.cli import main
from apt.files.whole import read_jsonl
from apt.runs.config import load_config
from apt.runs.config.presets import find_preset
from apt.runs.estimate.dry_run import DryRun, dry_run

ROOT = Path(__file__).parents[2]
PRESETS = sorted((ROOT / "configs").glob("*.yaml"))
WIDE, FFN, VOCABULARY, POSITIONS = 768, 3072, 50265, 514  # RoBERTa-base


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def plan_of(preset: str, *overrides: str) -> DryRun:
    return dry_run(load_config(ROOT / f"configs/{preset}.yaml", list(overrides)))


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_every_preset_can_be_planned(preset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(preset), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "event " in shown
    assert load_config(preset).output_dir == f"runs/{preset.stem}"


# From the authors' scripts: steps an epoch, the events' window, the first that prunes, densities left.
@pytest.mark.parametrize(
    ("preset", "steps", "last", "first", "densities"),
    [
        ("roberta_base_sst2", 40 * 2105, 6315, 2646, [0.860, 0.666, 0.536, 0.457, 0.417, 0.402, 0.400]),
        ("roberta_base_mnli", 40 * 12272, 36816, 14846, [0.841]),
        ("t5_base_cnn_dm", 16 * 17945, 53835, 21654, [0.840]),
        ("roberta_base_rte", 120 * 78, 1872, 618, [0.870]),
    ],
)
def test_the_schedule_is_the_authors(preset: str, steps: int, last: int, first: int, densities: list[float]) -> None:
    plan = plan_of(preset)
    pruning = [event for event in plan.events if event.sparsity]
    assert (plan.total_steps, pruning[-1].step, pruning[0].step) == (steps, last, first)
    for event, density in zip(pruning, densities, strict=False):
        assert event.sparsity is not None
        assert 1.0 - event.sparsity == pytest.approx(density, abs=6e-4)


def test_the_budget_is_linear_and_counts_are_those_of_the_shapes() -> None:
    plan = plan_of("roberta_base_sst2")
    layer = 4 * (WIDE**2 + WIDE) + 2 * WIDE * FFN + FFN + WIDE + 4 * WIDE
    head = WIDE**2 + WIDE + 2 * WIDE + 2
    adapters = 12 * 8 * (2 * 2 * WIDE + WIDE + FFN)
    transform = 2 * 8 * WIDE
    assert plan.params == 12 * layer + (VOCABULARY + POSITIONS + 1) * WIDE + 2 * WIDE + head
    assert (plan.block_params, plan.adapters, plan.adapter_params) == (12 * layer, 36, adapters)
    assert plan.trainable_params == adapters + head + transform
    assert plan.target_params == plan.params - int(0.6 * 12 * layer)
    ratios = [event.rank_budget / adapters for event in plan.events if event.rank_budget]
    assert ratios == pytest.approx([1.3 + 0.3 * k for k in range(10)], abs=1e-3)
    assert plan.units == {"heads": [12] * 12, "neurons": [FFN] * 12}
    capped = plan_of("roberta_base_sst2", "max_tuning_params_ratio=0.01")
    assert capped.events[-1].rank_budget == int(0.01 * plan.params)


def test_a_decoder_is_cut_before_tuning() -> None:
    plan = plan_of("llama2_7b_alpaca")
    wide, ffn = 4096, 11008
    layer = 4 * wide**2 + 3 * wide * ffn + 2 * wide
    assert (plan.params, plan.block_params) == (32 * layer + 2 * 32000 * wide + wide, 32 * layer)
    assert (plan.adapters, plan.adapter_params) == (64, 64 * 8 * 2 * wide)
    assert (plan.events[0].step, plan.events[0].sparsity, plan.events[0].rank_budget) == (0, 0.3, None)
    assert len(plan.events) == 17
    assert all(event.sparsity is None for event in plan.events[1:])
    assert plan.total_steps == 15 * 1609  # 51,481 rows in batches of 4, of which 8 make a step


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a run that is done, of steps that no whole number of batches makes."""
    folder = tmp_path_factory.mktemp("planned")
    training = {"max_steps": -1, "epochs": 2.5, "batch_size": 7, "gradient_accumulation_steps": 2}
    path = write_config(folder, training=training, data={"max_train_samples": 187, "train_size": 192})
    assert main(["train", str(path), "max_tuning_params_ratio=0.4", "event_timing_steps=0"]) == 0
    return path


def test_a_run_does_what_was_planned(finished: Path) -> None:
    plan = dry_run(load_config(finished, ["max_tuning_params_ratio=0.4"]))
    run = finished.parent / "run"
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    events = read_jsonl(run / "events.jsonl")
    assert (plan.total_steps, plan.params) == (metrics["steps"], metrics["params_before"])
    assert [event.step for event in plan.events] == [event["step"] for event in events]
    assert [event.sparsity for event in plan.events] == [event["target_sparsity"] for event in events]
    assert [event.rank_budget for event in plan.events] == [event["rank"]["budget"] for event in events]
    assert plan.target_params is not None
    assert metrics["params_after"] <= plan.target_params


@pytest.mark.parametrize("method", ["lora", "adalora", "gsa", "spectral_a", "dynacsg", "p_tuning"])
def test_methods_without_pruning_have_a_plan_without_events(finished: Path, method: str) -> None:
    left = ["model.target_modules=null"] if method == "p_tuning" else []
    plan = dry_run(load_config(finished, [f"method={method}", *left]))
    assert plan.events == ()
    assert plan.trainable_params > 0
    assert plan.target_params == plan.params


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["min_heads=12", "min_neurons=1024"], "target_sparsity 0.6 is not reachable"),
        (["epochs=1", "num_events=5000"], "is too short for 5000 events"),
        (["target_modules=[qkv]"], "'qkv' matches no linear"),
        (["train_size=null"], "needs data.train_size"),
        (["shape={model_type: robertta}"], "no model of model_type 'robertta'"),
        (["shape={hidden_size: 3}"], "model.shape must name the model_type"),
        (["shape={model_type: bloom}", "num_labels=null"], "model_type 'bloom' cannot be pruned"),
        (["model=no-such/model"], "configuration of no-such/model cannot be read"),
        (["distill_end=0.01"], "distill_end is step"),
    ],
)
def test_what_a_dry_run_finds(overrides: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        plan_of("roberta_base_sst2", *overrides)


def test_a_model_of_another_shape_is_not_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = {"model_type": "bert", "hidden_size": 32, "intermediate_size": 65}
    path = write_config(tmp_path, model={"shape": shape})
    assert main(["train", str(path)]) == 2
    assert "has intermediate_size=64, but model.shape says 65" in capsys.readouterr().err


def test_flags_without_a_file_take_a_preset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_preset("roberta", "glue/sst2") == ROOT / "configs/roberta_base_sst2.yaml"
    flags = ["--model_type", "roberta", "--dataset", "sst2", "--sparsity_level", "0.3"]
    for arguments in (["seed=5", *flags], [*flags, "seed=5"]):
        assert main(["config", *arguments]) == 0
        shown = capsys.readouterr().out
        assert all(text in shown for text in ("glue/sst2", "target_sparsity: 0.3", "seed: 5", "roberta-base"))
    assert main(["config", "--model_type", "roberta", "--dataset", "poems"]) == 2
    assert "no preset roberta_base_poems.yaml" in capsys.readouterr().err
    assert main(["config", "--dataset", "sst2"]) == 2
    assert "give a config file, or --model_type and --dataset" in capsys.readouterr().err
