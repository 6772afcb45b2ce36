"""What is measured of a model that was trained: scores, size and speed of its export, and what each event saved."""

import copy
from pathlib import Path
from typing import Any

from torch import nn

from apt.export import export_model, load_model
from apt.files import write_json
from apt.methods import METHODS
from apt.runs.arguments import choose_device
from apt.runs.config import RunConfig
from apt.runs.data import Loader
from apt.runs.evaluation.evaluate import Evaluator, latency_ms, time_events
from apt.runs.evaluation.language import generation_metrics
from apt.runs.models import build_model
from apt.runs.tasks import GENERATING, chosen_scores, metric_names
from apt.surgery import patch_model, summary
from apt.training.trainer import APTrainer
from apt.version import versions_used

TIMINGS, MODEL = "event_timing.json", "model"


def measure(
    config: RunConfig, tokenizer: Any, data: Loader, partial: Path, trainer: APTrainer
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Export the model, load it again, and measure what was loaded; writes the model and the timings of the events.

    Returns what config, data, seed and versions decide, and what a clock says.
    """
    settings, device = config.evaluation, choose_device(config.hardware)
    metric = metric_names(config)[0]
    evaluator = build_evaluator(config, tokenizer)
    model = trainer.model
    assert model is not None
    counts, distillation = summary(model), trainer.controller.distillation
    trained = evaluator.evaluate(model, data.test, getattr(data, "validation", None))[metric]
    export_model(model, partial / MODEL, overwrite=True)
    tokenizer.save_pretrained(partial / MODEL)
    small = load_model(partial / MODEL).to(device)
    dense = build_model(config, data.num_labels, tokenizer).to(device)
    times = _latency(config, dense, small, len(tokenizer))
    if config.model.task in GENERATING:
        times |= _generation(config, dense, small, data)
    scores = scores_of(config, evaluator, small, data)
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


def build_evaluator(config: RunConfig, tokenizer: Any) -> Evaluator:
    """The evaluator of a config's task."""
    settings = config.evaluation
    return Evaluator(
        tokenizer,
        settings.inference_batch_size,
        config.model.task,
        max_new_tokens=config.data.max_target_length,
        num_beams=settings.num_beams,
        max_answer_length=settings.max_answer_length,
        no_answer_threshold=settings.no_answer_threshold,
    )


def scores_of(config: RunConfig, evaluator: Evaluator, model: nn.Module, data: Loader) -> dict[str, float]:
    """The scores asked for, on the test split."""
    return chosen_scores(config, evaluator.evaluate(model, data.test, getattr(data, "validation", None)))


def _goal(config: RunConfig, trainer: APTrainer) -> dict[str, Any]:
    """What was asked of pruning, and with a speed-up as the goal what the latency table says was reached."""
    pruning, prunes = config.pruning, config.apt_config().prunes
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
