"""What is measured of a model that was trained: scores, size and speed of its export, and what each event saved."""

import copy
from pathlib import Path
from typing import Any

from torch import nn

from apt.export import export_model, load_model
from apt.files.whole import write_json
from apt.layers.modes import evaluating
from apt.methods import METHODS
from apt.runs.arguments import choose_device
from apt.runs.config import RunConfig
from apt.runs.data import Loader
from apt.runs.evaluation.evaluate import Evaluator, latency_ms, time_events
from apt.runs.evaluation.language import generation_metrics
from apt.runs.models import build_model
from apt.runs.run_folder import MODEL, TIMINGS
from apt.runs.tasks import TASKS
from apt.surgery import patch_model, summary
from apt.training.trainer import APTrainer
from apt.version import versions_used

# What GLUE's page shows, where it is not accuracy.
GLUE_METRICS = {"cola": "matthews", "mrpc": "f1", "qqp": "f1"}


def measure_run(
    config: RunConfig, tokenizer: Any, data: Loader, partial: Path, trainer: APTrainer
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Export the model, load it again, and measure what was loaded; writes the model and the timings of the events.

    Returns what config, data, seed and versions decide, and what a clock says.
    """
    settings = config.evaluation
    device = choose_device(config.hardware)
    metric = metric_names(config)[0]
    evaluator = Evaluator(tokenizer, settings)
    model = trainer.model
    assert model is not None
    counts = summary(model)
    distillation = trainer.controller.distillation
    trained = score_model(config, evaluator, model, data)[metric]
    export_model(model, partial / MODEL, overwrite=True)
    tokenizer.save_pretrained(partial / MODEL)
    small = load_model(partial / MODEL).to(device)
    dense = build_model(config, data.num_labels, tokenizer).to(device)
    times = _latency(config, dense, small, len(tokenizer))
    if TASKS[config.model.task].writes:
        times |= _generation(config, dense, small, data)
    scores = score_model(config, evaluator, small, data)
    if trainer.controller.events and settings.event_timing_steps:
        write_json(partial / TIMINGS, _event_timing(config, tokenizer, data, trainer, dense))
    metrics = {
        "method": config.model.method,
        "ablation": config.ablation,
        "model": config.model.name,
        "data": config.data.datasets,
        "metric": metric,
        **scores,
        f"{metric}_before_export": trained,
        **_goal(config, trainer),
        "sparsity": counts.sparsity,
        "params_before": counts.params_before,
        "params_after": counts.params_after,
        "num_events": len(trainer.controller.events),
        "active_gates": counts.active if METHODS[config.model.method].make is not None else None,
        "steps": trainer.state.global_step,
        "self_distillation": None if distillation is None else distillation.account(),
        "train_size": len(data.train),
        "test_size": len(data.test),
        "unit": data.unit,
        "seed": config.training.seed,
        "device": str(device),
        "versions": versions_used(),
    }
    return metrics, times


def metric_names(config: RunConfig) -> list[str]:
    """What a run is scored by, what a report shows first in front: as asked, as GLUE does it, or all of the task."""
    if config.evaluation.metrics is not None:
        return config.evaluation.metrics
    names = TASKS[config.model.task].metrics
    first = GLUE_METRICS.get(config.data.datasets.rpartition("/")[2].lower())
    return [first, *(name for name in names if name != first)] if first in names else list(names)


def score_model(config: RunConfig, evaluator: Evaluator, model: nn.Module, data: Loader) -> dict[str, float]:
    """The scores asked for on the test split, in their order, and whatever else was counted on the way."""
    task = TASKS[config.model.task]
    with evaluating(model):
        found = task.score(evaluator, model, data)
    asked = {name: found[name] for name in metric_names(config)}
    others = {name: value for name, value in found.items() if name not in task.metrics}
    return asked | others


def _goal(config: RunConfig, trainer: APTrainer) -> dict[str, Any]:
    """What was asked of pruning, and with a speed-up as the goal what the latency table says was reached."""
    pruning = config.pruning
    prunes = config.apt_config().prunes
    if not prunes or pruning.target_speedup is None:
        return {"target_sparsity": pruning.target_sparsity if prunes else 0.0}
    events = [event for event in trainer.controller.events if event.prune is not None]
    predicted = events[-1].predicted_speedup if events else None
    return {"target_sparsity": None, "target_speedup": pruning.target_speedup, "predicted_speedup": predicted}


def _latency(config: RunConfig, dense: nn.Module, small: nn.Module, vocab_size: int) -> dict[str, Any]:
    settings = config.evaluation
    shape = settings.inference_batch_size, settings.inference_length
    times = latency_ms(
        {"dense": dense, "small": small},
        batch_size=shape[0],
        length=shape[1],
        vocab_size=vocab_size,
        repeats=settings.inference_repeats,
    )
    return {
        "latency_ms_dense": times["dense"],
        "latency_ms_small": times["small"],
        "speedup": times["dense"] / times["small"],
        "latency_shape": list(shape),
    }


def _generation(config: RunConfig, dense: nn.Module, small: nn.Module, data: Loader) -> dict[str, Any]:
    settings = config.evaluation
    return generation_metrics(
        dense,
        small,
        data.test,
        batch_size=settings.inference_batch_size,
        length=min(settings.inference_length, max(map(len, data.test.columns["input_ids"]))),
        new_tokens=settings.generated_tokens,
        repeats=settings.inference_repeats,
    )


def _event_timing(
    config: RunConfig, tokenizer: Any, data: Loader, trainer: APTrainer, dense: nn.Module
) -> dict[str, Any]:
    """Steps before and after each event, on a batch of sentences of middling length."""
    size = min(config.training.batch_size, len(data.train))
    by_length = sorted(range(len(data.train)), key=lambda i: len(data.train.columns["input_ids"][i]))
    middle = (len(by_length) - size) // 2
    device = next(dense.parameters()).device
    batch = data.collator([data.train[i] for i in by_length[middle : middle + size]])
    batch = {name: value.to(device) for name, value in batch.items()}
    steps = config.evaluation.event_timing_steps

    def make_model() -> nn.Module:
        return patch_model(copy.deepcopy(dense), config.apt_config()).to(device)

    rows = time_events(make_model, trainer.controller.events, batch, steps)
    return {"sentences": size, "tokens": batch["input_ids"].shape[1], "steps": steps, "events": rows}
