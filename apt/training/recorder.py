"""What a run leaves for its report beside the events: a line of numbers each logging step, the shapes at each event.

`steps.jsonl` has a row at each logging step: loss, learning rate, seconds, tokens, memory; and one at each score on the
way. `shapes.jsonl` has a row at the start and one after each event: the units that are left, the rank of every adapter,
and quantiles of the salience of the units that stayed and of those that went.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apt.families import known_anatomy
from apt.files.whole import append_jsonl, write_jsonl
from apt.layers import APTAdapter
from apt.pruning.ranks import adapter_sizes, total_params
from apt.records import Event
from apt.training.controller import Controller
from apt.training.memory import memory_mb

STEPS = "steps.jsonl"
SHAPES = "shapes.jsonl"
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)  # of the salience of a kind of units


class Recorder:
    """Writes both files of a run into a folder. It decides nothing and draws no random number.

    Args:
        folder: of the run; where it is resumed, rows after the step it goes on from are dropped, as they come again.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._salience: dict[str, Tensor] = {}  # of the units, before the step that is under way
        self._seen = 0  # events that have their row

    def begin(self, controller: Controller) -> None:
        """Once the controller exists, and before its first event."""
        self._seen = len(controller.events)
        if controller.step == 0 and not controller.events:
            write_jsonl(self.folder / STEPS, [])
            places = _places(controller.model)
            write_jsonl(self.folder / SHAPES, [{**_shape(controller), "event": False, "places": places}])
            return
        for name in (STEPS, SHAPES):
            rows = [row for row in _whole_rows(self.folder / name) if row["step"] <= controller.step]
            write_jsonl(self.folder / name, rows)

    def before_step(self, controller: Controller) -> None:
        """Keep the scores before the controller takes a step: an event shortens those it was decided by."""
        pruning = controller.pruning
        self._salience = {} if pruning is None else dict(pruning.salience.values)

    def after_step(self, controller: Controller) -> list[Event]:
        """Record the events that came with the step, and return them."""
        new = controller.events[self._seen :]
        for event in new:
            row = _shape(controller) | {"step": event.step, "event": True, "salience": _spread(self._salience, event)}
            append_jsonl(self.folder / SHAPES, row)
        self._seen = len(controller.events)
        return new

    def log(self, step: int, logs: dict[str, Any], device: torch.device, **more: Any) -> None:
        """A row at a logging step; `more` goes on top of what is logged."""
        memory = memory_mb(device)
        used = {} if memory is None else {"memory_mb": memory[0], "peak_mb": memory[1]}
        append_jsonl(self.folder / STEPS, {"step": step, **logs, **more, **used})

    def score(self, step: int, logs: dict[str, Any]) -> None:
        """A row with scores on the way."""
        append_jsonl(self.folder / STEPS, {"step": step, **logs})


def _shape(controller: Controller) -> dict[str, Any]:
    """What is left of the model now."""
    sizes = adapter_sizes(controller.model, {})
    return {
        "step": controller.step,
        "units": {group.name: group.num_units for group in controller.groups},
        "ranks": {name: size.rank for name, size in sizes.items()},
        "adapter_params": total_params(sizes),
    }


def planned_sparsity(controller: Controller) -> float | None:
    """The sparsity that the schedule asks for now; None where nothing is pruned, or time is the goal."""
    config = controller.config
    if not config.prunes or config.pruning.target_speedup is not None:
        return None
    if config.pruning.prune_before_tuning:
        return config.pruning.target_sparsity
    return config.pruning.schedule(controller.total_steps).get_current_sparsity(controller.step)


def event_scalars(event: Event, adapter_params: int) -> dict[str, float]:
    """What is logged of an event."""
    kept = {} if event.prune is None else event.prune.kept
    left: dict[str, float] = {}
    for name, positions in kept.items():
        kind = f"event_{name.rpartition('.')[2]}"
        left[kind] = left.get(kind, 0) + len(positions)
    asked = {"event_target_sparsity": event.target_sparsity, "event_target_speedup": event.target_speedup}
    return {
        "event_step": event.step,
        "event_sparsity": event.sparsity,
        **{name: value for name, value in asked.items() if value is not None},
        **left,
        "event_adapter_params": adapter_params,
        "event_trainable_params": event.trainable_params,
        "event_seconds": event.seconds,
    }


def _places(model: nn.Module) -> dict[str, list[Any]]:
    """Where the adapters of prunable layers stand: name -> stack, number of the layer, role; none without a family."""
    anatomy = known_anatomy(model)
    if anatomy is None:
        return {}
    found: dict[str, list[Any]] = {}
    for part in anatomy.parts:
        layer = part.layer
        cross = "cross " if part.table.units == "cross_heads" else ""
        for role, module in part.linears.items():
            if isinstance(module, APTAdapter):
                found[part.paths[role]] = [layer.stack.name, layer.index, cross + role]
    return found


def _spread(salience: dict[str, Tensor], event: Event) -> dict[str, dict[str, list[float]]] | None:
    """Quantiles of the salience of each kind of units before an event, of those it kept and those it removed."""
    if event.prune is None or not salience:
        return None
    kinds: dict[str, dict[str, list[Tensor]]] = {}
    for name, kept in event.prune.kept.items():
        if name in salience:
            stays = torch.zeros(salience[name].numel(), dtype=torch.bool)
            stays[kept] = True
            scores = salience[name].detach().double().cpu()
            kind = kinds.setdefault(name.rpartition(".")[2], {"kept": [], "removed": []})
            kind["kept"].append(scores[stays])
            kind["removed"].append(scores[~stays])
    return {kind: {side: _quantiles(parts) for side, parts in sides.items()} for kind, sides in kinds.items()}


def _quantiles(parts: list[Tensor]) -> list[float]:
    """`QUANTILES` of all values; none where there is no value."""
    values = torch.cat(parts)
    points = torch.tensor(QUANTILES, dtype=values.dtype)
    return torch.quantile(values, points).tolist() if values.numel() else []


def _whole_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file up to the first that is cut off: a process may be killed while it writes."""
    if not path.is_file():
        return []
    rows: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            break
        rows.append(row)
    return rows
