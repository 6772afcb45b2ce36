"""Tiny models that were pruned, trained a little and exported, for the programs that exports are read by."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tiny_models import fill_adapters, free_heads, random_plan, tiny_batch, tiny_model

import apt
from apt.families import anatomy_of
from apt.pruning.units import find_units
from apt.records import PrunePlan
from apt.surgery.prune import apply_prune_plan


def free_export(name: str, folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
    """Each layer with sizes of its own: one has no heads, where its family can, another no neurons."""
    model = fill_adapters(apt.patch_model(tiny_model(name, dtype, **settings), rank=3))
    empty = [*free_heads(model)[-1:], next(key for key in apt.summary(model).units if key.endswith("neurons"))]
    apply_prune_plan(model, random_plan(model, empty=empty, seed=1))
    return apt.export_model(model, folder)


def sized_export(
    name: str,
    folder: Path,
    heads: Sequence[int],
    neurons: Sequence[int],
    dtype: torch.dtype = torch.float32,
    **more: Any,
) -> Path:
    """Layers with that many heads (KV groups) and neurons: the last ones of each."""
    model = fill_adapters(apt.patch_model(tiny_model(name, dtype, num_hidden_layers=len(heads), **more), rank=3))
    left = {f"layers.{layer}.heads": count for layer, count in enumerate(heads)}
    left |= {f"layers.{layer}.neurons": count for layer, count in enumerate(neurons)}
    groups = find_units(anatomy_of(model))
    kept = {group.name: list(range(group.num_units - left[group.name], group.num_units)) for group in groups}
    apply_prune_plan(model, PrunePlan(step=1, target_sparsity=0.5, kept=kept, round_to=1))
    return apt.export_model(model, folder)


def uniform_export(name: str, folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
    """All layers alike: half of the neurons are gone, and of the heads as many as a stock configuration can say."""
    batches = [tiny_batch(name, seed=seed) for seed in range(2)]
    rules = {"layout": "uniform", "unit_types": ["neuron"], "round_to": 4, "calibration_batches": 2}
    model = apt.compress(tiny_model(name, dtype, **settings), batches, 0.3, **rules)
    return apt.export_model(fill_adapters(model), folder)


def halved_export(name: str, folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
    """All layers alike, and each with every second unit, heads and neurons; made in no time."""
    model = fill_adapters(apt.patch_model(tiny_model(name, dtype, **settings), rank=3))
    plan = random_plan(model, seed=1)
    halves = {group: list(range(0, count, 2)) for group, count in apt.summary(model).units.items()}
    apply_prune_plan(model, replace(plan, kept=halves))
    return apt.export_model(model, folder)
