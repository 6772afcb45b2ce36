"""A run that starts again, on the same model or a new one, and the best model of a run whose sizes change."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers.integrations
from safetensors.torch import load_file
from tiny_models import tiny_model
from tiny_trainer import EVENTS, STEPS, Rows, losses, trainer
from transformers import TrainerCallback, TrainingArguments
from transformers.hyperparameter_search import ALL_HYPERPARAMETER_SEARCH_BACKENDS
from transformers.trainer_utils import BestRun, HPSearchBackend

import apt

TAUGHT = {"use_self_distillation": True, "distill_end": 27}
SHORT = {"num_events": 2, "prune_end": 8}


def adapter_params(model: Any) -> int:
    return sum(parameter.numel() for name, parameter in model.named_parameters() if ".lora_" in name)


class OutOfMemory(apt.APTrainer):
    """A GPU whose memory ends at one step with batches of eight."""

    step = 10

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == self.step and len(inputs["labels"]) > 7:
            raise RuntimeError("CUDA out of memory.")
        return super().compute_loss(model, inputs, *args, **kwargs)


# "at once": units go before step 1, so that tuning begins with the adapters that are left.
GOALS: dict[str, dict[str, Any]] = {"pruning": {}, "a teacher": TAUGHT, "at once": {"prune_before_tuning": True}}


@pytest.mark.parametrize("goal", GOALS)
def test_a_second_train_neither_grows_ranks_nor_prunes_again(goal: str, tmp_path: Path) -> None:
    ran = trainer(tmp_path, **GOALS[goal])
    ran.train()
    units, size, params = apt.summary(ran.model).units, adapter_params(ran.model), apt.summary(ran.model).ranks
    ran.train()
    assert apt.summary(ran.model).units == units
    assert (adapter_params(ran.model), apt.summary(ran.model).ranks) == (size, params)
    assert list(losses(ran)) == list(range(1, STEPS + 1))
    apt.export_model(ran.model, tmp_path / "small")


@pytest.mark.parametrize(("goal", "step"), [("pruning", 10), ("a teacher", 4), ("a teacher", 18)])
def test_memory_that_ends_starts_the_run_again_with_smaller_batches(goal: str, step: int, tmp_path: Path) -> None:
    """After an event, in a decay and beside a teacher: ranks end within one run's budget, and it can be resumed."""
    settings = {**GOALS[goal], "auto_find_batch_size": True, "save_strategy": "steps", "save_steps": 20}
    ran = trainer(tmp_path / "again", kind=OutOfMemory, **settings)
    ran.step = step
    at_first = adapter_params(ran.model)
    params = sum(p.numel() for name, p in ran.model.named_parameters() if ".lora_" not in name and "apt_" not in name)
    ran.train()
    assert list(losses(ran)) == list(range(1, STEPS + 1))
    assert apt.summary(ran.model).sparsity >= 0.6
    tuning = ran.controller.timeline.tuning
    assert at_first < adapter_params(ran.model) <= ran.apt_config.tuning.budget(tuning, 24, at_first, params)
    smaller = {"per_device_train_batch_size": ran._train_batch_size}
    resumed = trainer(tmp_path / "resumed", **{**GOALS[goal], **smaller})
    resumed.train(resume_from_checkpoint=str(tmp_path / "again/checkpoint-20"))
    ours, theirs = resumed.model.state_dict(), ran.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_masks_are_open_again_when_a_run_starts_anew(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step == 7  # the first event is at 8

    ran = trainer(tmp_path, callbacks=[Stop()])
    ran.train()
    assert apt.summary(ran.model).masked
    ran.controller.leave()
    assert not apt.summary(ran.model).masked
    apt.export_model(ran.model, tmp_path / "whole")


def test_adalora_starts_again_with_the_ranks_it_has(tmp_path: Path) -> None:
    ran = adalora(tmp_path)
    ran.train()
    ranks = apt.summary(ran.model).ranks
    ran.train()
    assert apt.summary(ran.model).ranks == ranks
    assert list(losses(ran)) == list(range(1, STEPS + 1))


def adalora(folder: Path, **settings: Any) -> Any:
    model = apt.patch_model(
        tiny_model("bert", torch.float32), method="adalora", rank=3, tinit=2, tfinal=10, deltaT=2, target_r=1
    )
    known = {"max_steps": STEPS, "save_strategy": "no", "logging_steps": 1, "report_to": "none", "disable_tqdm": True}
    names = set(TrainingArguments.__dataclass_fields__)
    known |= {key: settings.pop(key) for key in list(settings) if key in names}
    arguments = TrainingArguments(str(folder), use_cpu=True, seed=4, **known)
    return apt.APTrainer(model=model, args=arguments, train_dataset=Rows(), **settings)


BEST = {"load_best_model_at_end": True, "metric_for_best_model": "score", "greater_is_better": True}
BEST |= {"save_strategy": "steps", "save_steps": 5, "eval_strategy": "steps", "eval_steps": 5}


def falling() -> dict[str, Any]:
    """Scores that only fall: the best of all is the first that may be."""
    scores = iter(range(100, 0, -1))
    return {"eval_dataset": Rows(), "compute_metrics": lambda _: {"score": next(scores)}}


def test_the_best_model_of_adalora_is_one_with_the_ranks_that_stay(tmp_path: Path) -> None:
    ran = adalora(tmp_path, **BEST, **falling())
    ran.train()
    assert ran.state.best_global_step == 20  # where the budget ends
    saved, ours = load_file(tmp_path / "checkpoint-20/model.safetensors"), ran.model.state_dict()
    assert all(torch.equal(ours[key], value) for key, value in saved.items())
    apt.export_model(ran.model, tmp_path / "small")


@pytest.mark.parametrize("unit_types", [("head", "neuron"), ("head", "neuron", "hidden")])
def test_the_best_model_is_taken_from_beside_its_teacher(unit_types: tuple[str, ...], tmp_path: Path) -> None:
    """At step 25 there is a teacher, and with it the dense weights; the model at the end has neither."""
    ran = trainer(tmp_path, unit_types=unit_types, **TAUGHT, **BEST, **falling())
    answers = {}

    class Look(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 25:
                answers["best"] = answer(kwargs["model"])

    ran.add_callback(Look())
    ran.train()
    assert ran.state.best_global_step == 25
    assert ran.controller.distillation.over
    torch.testing.assert_close(answer(ran.model), answers["best"], rtol=1e-5, atol=1e-5)
    apt.export_model(ran.model, tmp_path / "small")
    torch.testing.assert_close(answer(apt.load_model(tmp_path / "small")), answers["best"], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def answer(model: Any) -> torch.Tensor:
    training = model.training
    logits: torch.Tensor = model.eval()(input_ids=torch.arange(1, 9)[None]).logits
    model.train(training)
    return logits


def made(trial: Any = None) -> Any:
    rank = 3 if trial is None else trial.params["rank"]
    return apt.patch_model(tiny_model("bert", torch.float32), rank=rank)


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    return TrainingArguments(
        str(folder), use_cpu=True, report_to="none", disable_tqdm=True, logging_steps=1, seed=4, **settings
    )


@pytest.mark.parametrize("goal", ["pruning", "a teacher"])
def test_with_a_model_made_for_each_run_each_run_is_the_first(goal: str, tmp_path: Path) -> None:
    sizes = {"per_device_train_batch_size": 8, "max_steps": STEPS, "save_strategy": "no", "learning_rate": 3e-3}
    settings = {**EVENTS, **GOALS[goal]}
    ran = apt.APTrainer(model_init=made, args=arguments(tmp_path, **sizes), train_dataset=Rows(), **settings)
    runs = []
    for _ in range(2):
        ran.train()
        assert apt.summary(ran.model).sparsity >= 0.6
        runs.append((losses(ran), apt.summary(ran.model).ranks, apt.summary(ran.model).units))
    assert runs[0] == runs[1]


class Two:
    """A search for settings that tries two."""

    def ensure_available(self) -> None: ...

    def default_hp_space(self, trial: Any) -> Any:
        return trial

    def run(self, trainer: Any, n_trials: int, direction: str, **_: Any) -> BestRun:
        found = []
        for number, rank in enumerate((2, 5)):
            trial = SimpleNamespace(number=number, params={"rank": rank, "learning_rate": 1e-3 * rank})
            trainer.objective = None
            trainer.train(trial=trial)
            found.append(apt.summary(trainer.model))
        return BestRun(str(n_trials), 0.0, {"found": found})


def test_a_search_for_settings_prunes_each_of_its_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend.OPTUNA, Two)
    monkeypatch.setattr(
        transformers.integrations, "hp_params", lambda trial: trial.params
    )  # asks which searches are installed
    ran: Any = apt.APTrainer(
        model_init=made,
        args=arguments(tmp_path, max_steps=12, save_strategy="no"),
        train_dataset=Rows(),
        **{**EVENTS, **SHORT, "adaptive_rank_update": False},
    )
    best = ran.hyperparameter_search(backend="optuna", hp_space=lambda trial: trial.params, n_trials=2)
    first, second = best.hyperparameters["found"]
    assert first.sparsity >= 0.6
    assert second.sparsity >= 0.6
    assert (set(first.ranks.values()), set(second.ranks.values())) == ({2}, {5})
    with pytest.raises(ValueError, match="not patched"):
        apt.APTrainer(model_init=lambda: tiny_model("bert"), args=arguments(tmp_path), train_dataset=Rows())
