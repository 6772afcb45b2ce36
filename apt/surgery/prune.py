"""Carries out plans, on model and optimizer together. In a run nothing else changes a shape.

Parameters keep their identity (`param.data` is exchanged), so optimizer groups and their order stay as they are, and
the moments of every surviving row and column stay with it.
"""

from typing import Any

import torch
from torch import Tensor, nn

from apt.families import Attention, anatomy_of
from apt.layers import TRANSFORM, APTAdapter, LayerTransform, exchange
from apt.pruning.dimensions import NAME, Group, HiddenGroup, find_dimensions
from apt.pruning.units import UnitGroup, find_units
from apt.records import PrunePlan
from apt.surgery.moments import check_optimizer, follow, moments
from apt.surgery.ranks import drop_adapter
from apt.surgery.tails import fit_norm


@torch.no_grad()
def apply_prune_plan(
    model: nn.Module, plan: PrunePlan, optimizer: torch.optim.Optimizer | None = None, *, keep_tail: bool = False
) -> None:
    """Remove the units that the plan does not keep. The function of a model whose masks say the same does not change.

    Args:
        model: a patched model.
        plan: positions that stay, by unit group.
        optimizer: its moments follow.
        keep_tail: leave what was cut behind the kept part of each weight, where a dense teacher still finds it, and its
            adapters in the same order; the adapted layers then compute with a view. Otherwise its memory is freed.

    Raises:
        ValueError: the plan names other groups or positions than the model has.
    """
    if optimizer is not None:
        check_optimizer(optimizer)
    anatomy = anatomy_of(model)
    groups: dict[str, Group] = {group.name: group for group in find_units(anatomy)}
    if NAME in plan.kept:
        groups[NAME] = find_dimensions(anatomy)
    unknown = sorted(set(plan.kept) - set(groups))
    if unknown:
        raise ValueError(f"surgery: the plan of step {plan.step} names {unknown[0]}, which this model does not have")
    for name, positions in plan.kept.items():
        group = groups[name]
        for parameter in group.trained():
            moments(parameter, optimizer)  # refuses what could not follow
        if positions and (positions != sorted(set(positions)) or positions[-1] >= group.num_units or positions[0] < 0):
            raise ValueError(
                f"surgery: {name} has {group.num_units} units; kept positions must ascend and lie below that"
            )
    for name, positions in sorted(plan.kept.items(), key=lambda entry: entry[0] != NAME):
        group = groups[name]
        if len(positions) == group.num_units:
            continue
        if isinstance(group, HiddenGroup):  # first: a layer that loses its last head takes a copy of a bias along
            _prune_hidden(group, getattr(model, TRANSFORM, None), positions, optimizer, keep_tail)
        else:
            _prune_group(group, positions, optimizer, keep_tail)


def _prune_group(
    group: UnitGroup, positions: list[int], optimizer: torch.optim.Optimizer | None, keep_tail: bool
) -> None:
    kept = torch.tensor(positions, dtype=torch.long, device=group.mask.values.device)
    order = _retained_first(kept, group.num_units, _stored_units(group)) if keep_tail else kept
    for member in group.members:
        features = (kept[:, None] * member.width + torch.arange(member.width, device=kept.device)).flatten()
        _cut(member.linear, member.axis, features, optimizer, keep_tail)
    table, layer = group.part.table, group.part.layer.module
    if isinstance(table, Attention):
        table.set_heads(layer, group.num_units, len(positions), order)
    group.mask.keep(kept)
    if not positions:
        for member in group.members:
            drop_adapter(member.linear, optimizer)
        if isinstance(table, Attention):
            attention = group.part.module
            table.remove(layer).dense = (attention,) if keep_tail else ()


def _stored_units(group: UnitGroup) -> int:
    """Units that the weights store: the live ones, and those of a tail."""
    return group.reader.weight.shape[1] // group.mask.unit_size


def _prune_hidden(
    group: HiddenGroup,
    transform: LayerTransform | None,
    positions: list[int],
    optimizer: torch.optim.Optimizer | None,
    keep_tail: bool,
) -> None:
    """Keep the dimensions `positions` in every part of the model, a tied weight once."""
    kept, live = torch.tensor(positions, dtype=torch.long, device=group.mask.values.device), group.num_units
    done: set[tuple[int, int]] = set()

    def cut(tensor: Tensor | None, dim: int, keep_tail: bool = keep_tail) -> None:
        if tensor is None or (id(tensor), dim) in done:
            return
        done.add((id(tensor), dim))
        tail = keep_tail and not tensor.requires_grad  # what trains has moments, and a teacher its own copy of it
        index = _retained_first(kept, live, tensor.shape[dim]) if tail else kept
        follow(tensor, lambda t: t.index_select(dim, index), optimizer)

    for part in group.parts:
        module: Any = part.module
        if part.kind == "norm":
            cut(module.weight, 0)
            cut(module.bias, 0)
            module.n = len(positions)
            fit_norm(module)
        elif part.kind == "embedding":
            cut(module.weight, 1)
            module.embedding_dim = module.weight.shape[1]
        elif part.kind == "empty":
            cut(module.bias, 0, keep_tail=False)
            module.width = len(positions) if module.width else 0
        for axis in part.axes if part.kind == "linear" else ():
            dim = 0 if axis == "out" else 1
            stored = module.weight.shape[dim]
            cut(module.weight, dim)
            if axis == "out":
                cut(module.bias, 0)
            if isinstance(module, APTAdapter):
                if keep_tail:
                    _permute_teacher(module, axis, _retained_first(kept, live, stored))
                for tensor in module.side(axis):
                    cut(tensor, dim, keep_tail=False)
                setattr(module, "n_out" if axis == "out" else "n_in", len(positions))
            else:
                setattr(module, "out_features" if axis == "out" else "in_features", len(positions))
    stored = group.mask.order.numel()
    order = _retained_first(kept, live, stored) if keep_tail else None
    if transform is not None:  # from the student's dimensions to those of its teacher
        follow(transform.lora_A, lambda t: t.index_select(1, kept), optimizer)
        follow(transform.lora_B, lambda t: t.index_select(0, kept if order is None else order), optimizer)
    group.mask.keep(kept, order)


def _cut(
    linear: APTAdapter, axis: str, features: Tensor, optimizer: torch.optim.Optimizer | None, keep_tail: bool
) -> None:
    """Keep the given rows ("out") or columns ("in") of a linear and of its adapter."""
    dim = 0 if axis == "out" else 1
    live = linear.n_out if axis == "out" else linear.n_in
    tensors: list[tuple[Tensor, int]] = [(linear.weight, dim)]
    if axis == "out" and linear.bias is not None:
        tensors.append((linear.bias, 0))
    for tensor, along in tensors:
        index = _retained_first(features, live, tensor.shape[along]) if keep_tail else features
        exchange(tensor, tensor.data.index_select(along, index))
    if keep_tail:
        _permute_teacher(linear, axis, _retained_first(features, live, linear.weight.shape[dim]))
    if axis == "out":
        linear.n_out = features.numel()
    else:
        linear.n_in = features.numel()
    for tensor in linear.side(axis):
        follow(tensor, lambda t: t.index_select(dim, features), optimizer)


def _permute_teacher(linear: APTAdapter, axis: str, order: Tensor) -> None:
    """A teacher's adapter stays in the order of the weight that it is added to."""
    if linear.teacher_A is not None and linear.teacher_B is not None:
        if axis == "in":
            linear.teacher_A = linear.teacher_A.index_select(1, order)
        else:
            linear.teacher_B = linear.teacher_B.index_select(0, order)


def _retained_first(features: Tensor, live: int, full: int) -> Tensor:
    """The stable partition: kept features, then those cut now, then the tail of earlier events as it was."""
    part = torch.ones(full, dtype=torch.uint8, device=features.device)
    part[features] = 0
    part[live:] = 2
    return part.argsort(stable=True)
