"""What a run would do: config, family and plan on the meta device, without weights, data or network."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig

from apt.families import anatomy_of
from apt.families.config_files import UNUSABLE, check_gguf, check_model_folder, reason_of
from apt.families.locate import GGUF, resolve_model
from apt.files.reading import shown
from apt.layers import adapted
from apt.pruning.layers import LayerGroup
from apt.pruning.ranks import adapter_sizes, total_params
from apt.pruning.units import unit_masks
from apt.records import Target
from apt.runs.config import RunConfig
from apt.runs.tasks import TASKS
from apt.surgery import patch_model, patch_state
from apt.surgery.moments import OPTIMIZERS
from apt.training.controller import Calibration, Controller


@dataclass(frozen=True)
class PlannedEvent:
    """An event as the schedule asks for it."""

    step: int  # after which it comes; 0: before the first
    sparsity: float | None  # asked for, fraction of the block parameters; None: only ranks grow
    speedup: float | None  # with target_speedup: asked for in its place
    rank_budget: int | None  # adapter parameters that may then exist; None: ranks stay


@dataclass(frozen=True)
class DryRun:
    """What a run would do, counted on the meta device."""

    model: str
    model_type: str
    method: str
    total_steps: int
    events: tuple[PlannedEvent, ...]
    distilled_steps: tuple[int, int] | None  # first and last with a teacher
    repair: tuple[int, int, int] | None  # at each event: rounds, batches units are scored on, batches of the moments
    params: int  # of the model as it comes, task head included
    block_params: int  # of attention, FFN and norms inside the layers; 0 where the family is not known
    target_params: int | None  # of the whole model, adapters merged, at the target; None: it is a speed-up
    adapters: int
    adapter_params: int  # at the start
    trainable_params: int  # at the start: adapters, task head, and what distillation adds
    units: dict[str, list[int]]  # "heads", "neurons", ...: how many each part has that can be pruned

    def __str__(self) -> str:
        rows = [
            f"model        {self.model} ({self.model_type}): {self.params:,} parameters, "
            f"{self.block_params:,} of them in blocks",
            f"method       {self.method}: {self.adapters} adapters of {self.adapter_params:,} parameters, "
            f"{self.trainable_params:,} train",
            *(f"{kind + ' ':<12} {_written_counts(counts)}" for kind, counts in self.units.items()),
            f"steps        {self.total_steps:,}",
        ]
        if self.distilled_steps is not None:
            rows.append(f"teacher      from step {self.distilled_steps[0]:,} to step {self.distilled_steps[1]:,}")
        if self.repair is not None:
            rounds, scored, moments = self.repair
            rows.append(
                f"repair       at each event; {rounds} x {scored} batches forward and backward to choose, {moments} "
                f"forward for the moments"
            )
        for event in self.events:
            asked = ""
            if event.sparsity is not None:
                asked = f"sparsity {event.sparsity:6.1%}"
            if event.speedup is not None:
                asked = f"speed-up {event.speedup:6.2f}"
            ranks = "" if event.rank_budget is None else f"at most {event.rank_budget:,} adapter parameters"
            rows.append(f"event        after step {event.step:>7,}  {asked:<16}  {ranks}".rstrip())
        if self.target_params is not None:
            rows.append(f"at the end   at most {self.target_params:,} parameters, adapters merged")
        return "\n".join(rows)


def _written_counts(counts: list[int]) -> str:
    same = len(set(counts)) == 1
    return f"{len(counts)} x {counts[0]}" if same else " ".join(map(str, counts))


def stock_config(config: RunConfig) -> Any:
    """The stock configuration of a run's model: of `model.shape`, or else read from the model itself.

    Raises:
        ValueError: the shape names no model type that transformers has, or the model cannot be read.
    """
    shape = dict(config.model.shape or {})
    if not shape:
        name = resolve_model(config.model.name)
        if Path(name).is_dir():
            check_model_folder(Path(name), "dry run")
        if name.endswith(GGUF) and Path(name).exists():  # else on the hub
            check_gguf(Path(name), "dry run")
        path, _, file = name.rpartition("/")
        try:
            if name.endswith(GGUF):
                return AutoConfig.from_pretrained(path or ".", gguf_file=file)
            return AutoConfig.from_pretrained(name)
        except UNUSABLE as error:
            raise ValueError(
                f"dry run: the configuration of {config.model.name} cannot be read ({reason_of(error)}); give its "
                f"sizes in model.shape"
            ) from None
    kind = shape.pop("model_type", None)
    try:
        return AutoConfig.for_model(kind, **shape)
    except UNUSABLE as error:
        if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
            told = f"transformers has no model of model_type {shown(kind)}"
            raise ValueError(f"dry run: {told}; see model.shape") from None
        raise ValueError(f"dry run: no {kind} can have this shape ({reason_of(error)}); see model.shape") from error


def build_on_meta(config: RunConfig, device: str = "meta") -> nn.Module:
    """The model of a run with its task head, on the meta device: shapes without numbers.

    Under a FakeTensorMode another device can be named, whose operators are then those that are planned with.
    """
    task = TASKS[config.model.task]
    hf_config = stock_config(config)
    hf_config.update(task.head_settings)
    if config.model.num_labels is not None:
        hf_config.num_labels = config.model.num_labels
    try:
        with torch.device(device):
            model = getattr(transformers, task.head).from_config(hf_config)
    except UNUSABLE as error:
        raise ValueError(
            f"dry run: no {task.head} can have this shape ({reason_of(error)}); see model.shape"
        ) from error
    assert isinstance(model, nn.Module)
    return model


def total_steps(config: RunConfig) -> int:
    """Optimizer steps of a run, as the Trainer counts them.

    Raises:
        ValueError: neither max_steps nor the number of examples is known.
    """
    training = config.training
    size = config.data.train_size
    if training.max_steps > 0:
        return training.max_steps
    if size is None:
        raise ValueError(
            "dry run: it reads no data, so it needs data.train_size, the number of training examples, or "
            "training.max_steps"
        )
    size = min(size, config.data.max_train_samples or size)
    if config.distillation.teacher_refresh:
        size -= max(1, int(config.distillation.held_out_share * size))
    batches = math.ceil(size / training.batch_size)
    return math.ceil(training.epochs * max(1, math.ceil(batches / training.gradient_accumulation_steps)))


def dry_run(config: RunConfig) -> DryRun:
    """What a run of this config would do; everything that can be wrong without weights and data is found here.

    Raises:
        ValueError: what the run itself would say: an unknown family, a target that matches no linear, a schedule that
            does not fit the steps, a sparsity that the floors exclude, ...
    """
    steps = total_steps(config)
    model = build_on_meta(config)
    params = sum(p.numel() for p in model.parameters())
    settings = config.apt_config()
    # A decomposition on the meta device has no numbers that could be kept.
    patch_model(model, replace(settings, adapter=replace(settings.adapter, svd_cache=None)))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = OPTIMIZERS[config.training.optimizer](trained, lr=config.training.learning_rate)
    # A run holds some data out itself, and calibrates on what it trains on.
    no_data = Calibration(lambda _: ())
    controller = Controller(model, optimizer, steps, held_out=lambda _: 0.0, calibration=no_data)
    modules = [module for _, module in adapted(model) if module.rank]
    distillation = controller.distillation
    block_params = patch_state(model).block_params
    target = settings.pruning.target_sparsity if settings.prunes else 0.0
    by_speed = settings.prunes and settings.pruning.target_speedup is not None
    return DryRun(
        model=config.model.name,
        model_type=str(getattr(model.config, "model_type", "")),
        method=config.model.method,
        total_steps=steps,
        events=_planned_events(controller) if settings.prunes else (),
        distilled_steps=None if distillation is None else (distillation.first, distillation.end),
        repair=_repair(controller),
        params=params,
        block_params=block_params,
        target_params=None if by_speed else params - int(target * block_params),
        adapters=len(modules),
        adapter_params=sum(p.numel() for module in modules for p in module.adapter_parameters()),
        trainable_params=sum(p.numel() for p in model.parameters() if p.requires_grad),
        units=_units_of_parts(model, controller) if settings.prunes else {},
    )


def _repair(controller: Controller) -> tuple[int, int, int] | None:
    if controller.pruning is None or not controller.pruning.repairs:
        return None
    pruning = controller.pruning.config
    return pruning.rounds, pruning.calibration_batches, pruning.moment_batches


def _planned_events(controller: Controller) -> tuple[PlannedEvent, ...]:
    timeline = controller.timeline
    config = controller.config
    start = total_params(adapter_sizes(controller.model, {}))
    params = patch_state(controller.model).params_before
    found = []
    for step in timeline.steps:
        target = Target()
        if step in timeline.prune_steps:
            target = config.pruning.target_at(timeline.saving_at(step))
        budget = None
        if step in timeline.tuning.events:
            budget = config.tuning.budget(timeline.tuning, step, start, params)
        found.append(PlannedEvent(step, target.sparsity, target.speedup, budget))
    return tuple(found)


def _units_of_parts(model: nn.Module, controller: Controller) -> dict[str, list[int]]:
    anatomy = anatomy_of(model)
    found: dict[str, list[int]] = {}
    for name, mask in unit_masks(anatomy).items():
        stack, _, kind = name.split(".")
        counts = found.setdefault(kind if stack == "layers" else f"{stack} {kind}", [])
        counts.append(0 if mask is None else mask.num_units)
    stacks: dict[str, int] = {}
    for group in controller.groups:
        if isinstance(group, LayerGroup):
            stack = group.layer.stack.name
            stacks[stack] = stacks.get(stack, 0) + 1
    found |= {"layers" if stack == "layers" else f"{stack} layers": [count] for stack, count in stacks.items()}
    hidden = [group.num_units for group in controller.groups if group.kind == "hidden"]
    return found | ({"hidden": hidden} if hidden else {})
