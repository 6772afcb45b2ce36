"""Carries out plans, on model and optimizer together. In a run nothing else changes a shape.

Parameters keep their identity (`param.data` is exchanged), so optimizer groups and their order stay as they are, and
the moments of every surviving row and column stay with it.
"""

import torch
from torch import Tensor, nn

from apt.families import Attention, anatomy_of
from apt.layers import TRANSFORM, APTAdapter, LayerTransform, exchange
from apt.pruning.dimensions import NAME, Group, HiddenGroup, find_dimensions
from apt.pruning.layers import LayerGroup, find_layers, gone_layers
from apt.pruning.units import UnitGroup, find_units
from apt.records import PrunePlan
from apt.surgery.hidden import tell_width
from apt.surgery.moments import check_optimizer, follow, forget, moments
from apt.surgery.ranks import drop_adapter

AXES = {"out": 0, "in": 1}  # of a weight, for each of its sides


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
    groups |= {group.name: group for group in find_layers(anatomy)}
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
    gone = gone_layers(plan.kept)
    for name, positions in sorted(plan.kept.items(), key=lambda entry: entry[0] != NAME):
        group = groups[name]
        if len(positions) == group.num_units:
            continue
        if isinstance(group, LayerGroup):
            _remove_layer(group, optimizer, keep_tail)
        elif group.holder in gone:
            continue  # it goes with its layer, which a teacher keeps as it is
        elif isinstance(group, HiddenGroup):  # first: a layer that loses its last head takes a copy of a bias along
            _prune_hidden(group, getattr(model, TRANSFORM, None), positions, optimizer, keep_tail)
        else:
            _prune_group(group, positions, optimizer, keep_tail)


def _remove_layer(group: LayerGroup, optimizer: torch.optim.Optimizer | None, keep_tail: bool) -> None:
    module = group.layer.module
    for linear in module.modules():
        if isinstance(linear, APTAdapter):
            drop_adapter(linear, optimizer)
    forget(list(group.trained()), optimizer)
    group.layer.remove().dense = (module,) if keep_tail else ()


def _prune_group(
    group: UnitGroup, positions: list[int], optimizer: torch.optim.Optimizer | None, keep_tail: bool
) -> None:
    kept = torch.tensor(positions, dtype=torch.long, device=group.mask.values.device)
    order = _retained_first(kept, group.num_units, _stored_units(group)) if keep_tail else kept
    for member in group.members:
        features = (kept[:, None] * member.width + torch.arange(member.width, device=kept.device)).flatten()
        _cut(member.linear, member.axis, features, optimizer, keep_tail)
    table = group.part.table
    layer = group.part.layer.module
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
    kept = torch.tensor(positions, dtype=torch.long, device=group.mask.values.device)
    order = _retained_first(kept, group.num_units, group.mask.order.numel()) if keep_tail else kept
    done: set[tuple[int, int]] = set()
    for part in group.parts:
        for tensor, axis in part.tensors():
            if (id(tensor), axis) in done:
                continue
            done.add((id(tensor), axis))
            # What trains has moments, and a teacher has its own copy of it; it runs no empty attention.
            has_tail = keep_tail and part.kind != "empty" and not tensor.requires_grad
            _select(tensor, axis, order if has_tail else kept, optimizer)
        if isinstance(part.module, APTAdapter):
            for side in part.axes:
                _cut_adapter(part.module, side, kept, order if keep_tail else None, optimizer)
        tell_width(part, len(positions))
    # Tr leads from the student's dimensions to those of its teacher.
    if transform is not None:
        _select(transform.lora_A, 1, kept, optimizer)
        _select(transform.lora_B, 0, order, optimizer)
    group.mask.keep(kept, order if keep_tail else None)


def _cut(
    linear: APTAdapter, side: str, features: Tensor, optimizer: torch.optim.Optimizer | None, keep_tail: bool
) -> None:
    """Keep the given rows ("out") or columns ("in") of a linear and of its adapter."""
    axis = AXES[side]
    live = linear.n_out if side == "out" else linear.n_in
    order = _retained_first(features, live, linear.weight.shape[axis]) if keep_tail else features
    exchange(linear.weight, linear.weight.data.index_select(axis, order))
    if side == "out" and linear.bias is not None:
        exchange(linear.bias, linear.bias.data.index_select(0, order))
    _cut_adapter(linear, side, features, order if keep_tail else None, optimizer)


def _cut_adapter(
    linear: APTAdapter,
    side: str,
    features: Tensor,
    order: Tensor | None,
    optimizer: torch.optim.Optimizer | None,
) -> None:
    """Let the adapter, that of a teacher and the live width follow a cut of the weight.

    Args:
        linear: whose weight is cut.
        side: "out" or "in".
        features: that stay.
        order: of all that the weight stores, where a tail stays.
        optimizer: its moments follow.
    """
    if order is not None:
        _permute_teacher(linear, side, order)
    if side == "out":
        linear.n_out = features.numel()
    else:
        linear.n_in = features.numel()
    for tensor in linear.side(side):
        _select(tensor, AXES[side], features, optimizer)


def _select(tensor: Tensor, axis: int, index: Tensor, optimizer: torch.optim.Optimizer | None) -> None:
    """Keep these entries along an axis of a parameter, of its gradient and of its moments."""
    follow(tensor, lambda t: t.index_select(axis, index), optimizer)


def _permute_teacher(linear: APTAdapter, side: str, order: Tensor) -> None:
    """What is a teacher's alone stays in the order of the weight that it reads."""
    own = {"in": ("teacher_A", "teacher_weight"), "out": ("teacher_B", "teacher_weight", "teacher_bias")}
    for name in own[side]:
        if (tensor := getattr(linear, name)) is not None:
            setattr(linear, name, tensor.index_select(AXES[side], order))


def _retained_first(features: Tensor, live: int, full: int) -> Tensor:
    """The stable partition: kept features, then those cut now, then the tail of earlier events as it was."""
    part = torch.ones(full, dtype=torch.uint8, device=features.device)
    part[features] = 0
    part[live:] = 2
    return part.argsort(stable=True)
