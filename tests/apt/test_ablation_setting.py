"""Ablations as one setting: what each stands for, and that a run without a part differs in that part alone."""

from pathlib import Path
from typing import Any

import pytest
from own_loop import BRIEF, Loop, patched
from tiny_run import write_config

import apt
from apt.apt_config import ABLATIONS, APTConfig
from apt.cli import main
from apt.distillation import DistillationConfig
from apt.layers import adapted
from apt.pruning import PruningConfig
from apt.runs.config import load_config

CHANGED = {
    "full": set(),
    "w/o_Ap": {"target_sparsity", "num_events", "num_tuning_events", "prune_before_tuning", "use_self_distillation"},
    "w/o_AT": {"adaptive_rank_update"},
    "w/o_Ds": {"use_self_distillation"},
    "w/o_kurtosis": {"kurtosis"},
    "uniform_growth": {"rank_increase_strategy"},
}


def leaves(config: APTConfig) -> dict[str, Any]:
    return {**vars(config.pruning), **vars(config.tuning), **vars(config.distillation)}


@pytest.mark.parametrize("ablation", list(ABLATIONS))
def test_an_ablation_changes_its_own_settings_alone(ablation: str) -> None:
    """From a config in which every part is on."""
    teacher = DistillationConfig()
    object.__setattr__(teacher, "use_self_distillation", True)
    whole = APTConfig(pruning=PruningConfig(kurtosis="normalized", prune_before_tuning=True), distillation=teacher)
    without = whole.with_overrides(ablation=ablation)
    before, after = leaves(whole), leaves(without)
    assert {name for name in before if before[name] != after[name]} == CHANGED[ablation]
    assert without.with_overrides(momentum_salience=0.5).ablation == ablation
    assert leaves(without.with_overrides(momentum_salience=0.5)) == after


def test_names_that_are_not() -> None:
    with pytest.raises(ValueError, match=r"unknown ablation 'w/o AT'; did you mean 'w/o_AT'\? there are full, w/o_Ap"):
        APTConfig(ablation="w/o AT")
    with pytest.raises(ValueError, match="'uniform'; did you mean 'uniform_growth'"):
        APTConfig(ablation="uniform")
    with pytest.raises(ValueError, match="ablation 'w/o_AT' has replaced settings already, so it cannot become 'full'"):
        APTConfig(ablation="w/o_AT").with_overrides(ablation="full")


def run_of(name: str, ablation: str, **settings: Any) -> Any:
    given = {"target_sparsity": 0.5, "max_rank": 1000, **BRIEF, **settings}
    return Loop(name, patched(name), 30, ablation=ablation, **given).take(20)


def ranks_of(model: Any) -> list[int]:
    return [module.rank for _, module in adapted(model) if module.rank]


def test_without_pruning_ranks_grow_as_they_would() -> None:
    whole, without = (run_of("bert", ablation) for ablation in ("full", "w/o_Ap"))
    assert [e.rank.budget for e in whole.run.events] == [e.rank.budget for e in without.run.events]
    assert [e.step for e in whole.run.events] == [e.step for e in without.run.events] == [6, 12, 18]
    assert (apt.summary(without.model).sparsity, apt.summary(whole.model).sparsity >= 0.5) == (0.0, True)
    assert max(ranks_of(without.model)) > 3


def test_without_tuning_ranks_stay() -> None:
    without = run_of("bert", "w/o_AT")
    assert set(ranks_of(without.model)) == {3}
    assert apt.summary(without.model).sparsity >= 0.5


def test_without_kurtosis_a_decoder_has_no_outlier_term() -> None:
    assert run_of("llama", "full", num_events=1).run.pruning.units.outliers.mode == "paper"
    assert run_of("llama", "w/o_kurtosis", num_events=1).run.pruning.units.outliers.mode == "off"


def test_uniform_growth_gives_all_the_same() -> None:
    # Budgets are those of the whole method where nothing is pruned, as pruning makes some adapters cheaper than others.
    whole, alike = (run_of("bert", name, target_sparsity=0.0) for name in ("full", "uniform_growth"))
    assert [e.rank.budget for e in whole.run.events] == [e.rank.budget for e in alike.run.events]
    assert set(ranks_of(alike.model)) == {4 * 3}
    assert len(set(ranks_of(whole.model))) > 1


def test_the_flag_of_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path, training={"max_steps": 20}, evaluation={"event_timing_steps": 0})
    assert main(["train", str(config), "--ablation", "w/o_AT"]) == 0
    assert "ablation" in capsys.readouterr().out
    saved = load_config(tmp_path / "run" / "config.yaml")
    assert (saved.ablation, saved.tuning.adaptive_rank_update) == ("w/o_AT", False)
    assert main(["train", str(config), "--ablation", "w/o_Apt", f"output_dir={tmp_path / 'other'}"]) == 2
    assert "unknown ablation 'w/o_Apt'; did you mean 'w/o_A" in capsys.readouterr().err
    assert main(["config", str(config), "ablation=w/o_Ap"]) == 0
    assert "target_sparsity: 0.0" in capsys.readouterr().out
