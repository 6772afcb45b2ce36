"""Measures on this device what heads and neurons cost in time, on copies of one layer of the live model."""

import copy
import inspect
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from apt.families import Anatomy, Layer
from apt.families.linears import replace_module
from apt.layers import APTAdapter
from apt.layers.modes import evaluating
from apt.process.progress import progress
from apt.pruning.latency_table import LatencyTable
from apt.pruning.units import UnitGroup, find_units
from apt.records import PrunePlan
from apt.surgery.prune import apply_prune_plan
from apt.training.clock import medians_ms

REPEATS = 9
WIDTHS = 4  # a part is measured at so many widths beside none: the full one, and even shares of it

Call = tuple[tuple[Any, ...], dict[str, Any]]


def sample_batch(model: nn.Module, batch_size: int, length: int) -> dict[str, Any]:
    """Random token ids without padding, on the model's device; for an encoder-decoder as many for the decoder."""
    config: Any = model.config
    device = next(model.parameters()).device
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(config.get_text_config().vocab_size, (batch_size, length), generator=draw).to(device)
    batch: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if getattr(config, "is_encoder_decoder", False):
        batch["decoder_input_ids"] = ids
    if "use_cache" in inspect.signature(model.forward).parameters:
        batch["use_cache"] = False
    return batch


def measure_latency(anatomy: Anatomy, batch_size: int, length: int, repeats: int = REPEATS) -> LatencyTable:
    """The latency table of a patched model, as it would be without adapters.

    Of every part of a stack the layer with most units of it is taken. Copies of it, without adapters, lose units; they
    are timed on the input that the layer has in a forward pass. What a part takes is the difference to the copy that
    has lost it whole. The model itself is only run.

    Args:
        anatomy: of a patched model; its parts at their present sizes are what the table ends at.
        batch_size: sentences of a forward pass.
        length: tokens of each.
        repeats: timed passes of each copy, of which the median counts.
    """
    model = anatomy.model
    batch = sample_batch(model, batch_size, length)
    device = next(model.parameters()).device
    groups = find_units(anatomy)
    by_part: dict[str, list[UnitGroup]] = {}
    for group in groups:
        by_part.setdefault(f"{group.part.layer.stack.name}.{group.part.table.units}", []).append(group)
    widest = {part: max(found, key=lambda g: (g.num_units, g.part.layer.index)) for part, found in by_part.items()}
    with evaluating(model), torch.no_grad():
        whole = medians_ms({"": lambda: model(**batch)}, repeats, device)[""]
        calls = _calls(model, batch, [group.part.layer for group in widest.values()])
        parts = {}
        adapters = {}
        for part, group in progress(widest.items(), "timing layers", "part"):
            layer = group.part.layer
            points, with_adapters = _points(group, calls[layer.name], repeats, device)
            base = points[0][1]
            parts[part] = [[units, max(0.0, ms - base)] for units, ms in points]
            adapters[layer.stack.name] = with_adapters - points[-1][1]
    layers = Counter(layer.stack.name for layer in anatomy.layers)
    free = LatencyTable(
        device=_name(device), batch_size=batch_size, length=length, dense_ms=0.0, rest_ms=0.0, parts=parts
    )
    units_ms = free.total_ms({group.name: group.num_units for group in groups})
    rest = max(0.0, whole - units_ms - sum(layers[stack] * max(0.0, ms) for stack, ms in adapters.items()))
    return replace(free, dense_ms=rest + units_ms, rest_ms=rest)


def _calls(model: nn.Module, batch: Mapping[str, Any], layers: list[Layer]) -> dict[str, Call]:
    """The arguments with which each layer is called in a forward pass."""
    calls: dict[str, Call] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls[name] = args, kwargs

        return hook

    hooks = [layer.module.register_forward_pre_hook(keep(layer.name), with_kwargs=True) for layer in layers]
    model(**batch)
    for hook in hooks:
        hook.remove()
    return calls


def _points(group: UnitGroup, call: Call, repeats: int, device: torch.device) -> tuple[list[tuple[int, float]], float]:
    """Time of a layer with 0, some and all units of one of its parts, and of the layer itself, adapters and all."""
    args, kwargs = call
    widths = sorted({group.num_units * share // WIDTHS for share in range(WIDTHS + 1)})
    layer = group.part.layer.module
    runs: dict[str, Callable[[], object]] = {"": lambda: layer(*args, **kwargs)}
    for width in widths:
        narrow = _narrow_copy(group, width)
        runs[str(width)] = lambda narrow=narrow: narrow(*args, **kwargs)  # type: ignore[misc]
    times = medians_ms(runs, repeats, device)
    return [(width, times[str(width)]) for width in widths], times[""]


def _narrow_copy(group: UnitGroup, units: int) -> nn.Module:
    """A copy of a group's layer without adapters and with so many units; it stands in the model while it is cut."""
    layer = group.part.layer
    model = layer.model
    whole = layer.module
    twin = copy.deepcopy(whole)
    for module in twin.modules():
        if isinstance(module, APTAdapter):
            module.drop_adapter()
    plan = PrunePlan(step=0, target_sparsity=0.0, kept={group.name: [*range(units)]}, round_to=1)
    replace_module(model, layer.path, twin)
    try:
        apply_prune_plan(model, plan)
    finally:
        replace_module(model, layer.path, whole)
    return twin


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
