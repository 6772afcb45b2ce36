"""Carries out plans, on model and optimizer together. In a run nothing else changes a shape.

Parameters keep their identity (`param.data` is exchanged), so optimizer groups and their order stay as they are, and
the moments of every surviving row and column stay with it.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from apt.adapters import APTAdapter, adapted, exchange
from apt.dimensions import NAME, Group, HiddenGroup, find_dimensions, fit_norm, free_dimension_tails
from apt.distiller import TRANSFORM, LayerTransform
from apt.families import Attention, EmptyAttention, find_family
from apt.hidden import HiddenNorm
from apt.moments import check_optimizer, grown, moments, state_of
from apt.records import Event, PrunePlan, RankPlan, TrimPlan
from apt.units import UnitGroup, find_units


def apply_event(
    model: nn.Module, event: Event, optimizer: torch.optim.Optimizer | None = None, *, keep_tail: bool = False
) -> None:
    """Carry out an event's plans: in a run, or replayed onto a freshly patched model."""
    if event.prune is not None:
        apply_prune_plan(model, event.prune, optimizer, keep_tail=keep_tail)
    if event.rank is not None:
        apply_rank_plan(model, event.rank, optimizer)
    if event.trim is not None:
        apply_trim_plan(model, event.trim, optimizer)


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
    family = find_family(model)
    groups: dict[str, Group] = {group.name: group for group in find_units(model, family)}
    if NAME in plan.kept:
        groups[NAME] = find_dimensions(model, family)
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
    kept = torch.tensor(positions, dtype=torch.long, device=group.gate.mask.device)
    order = _retained_first(kept, group.num_units, _stored_units(group)) if keep_tail else kept
    for member in group.members:
        features = (kept[:, None] * member.width + torch.arange(member.width, device=kept.device)).flatten()
        _cut(member.linear, member.axis, features, optimizer, keep_tail)
    if isinstance(group.part, Attention):
        group.part.set_heads(group.layer.module, group.num_units, len(positions), order)
    group.gate.keep(kept)
    if not positions:
        for member in group.members:
            _drop_adapter(member.linear, optimizer)
        if isinstance(group.part, Attention):
            attention = group.layer.module.get_submodule(group.part.module)
            group.part.remove(group.layer.module).dense = (attention,) if keep_tail else ()


@torch.no_grad()
def free_tails(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Give back what `keep_tail` left behind: no teacher reads the dense weights any more."""
    transform = getattr(model, TRANSFORM, None)
    if any(isinstance(module, HiddenNorm) for module in model.modules()):
        group = find_dimensions(model, find_family(model))
        free_dimension_tails(group)
        if transform is not None:
            _follow(transform.lora_B, lambda t: t[: group.num_units].clone(), optimizer)
    for module in model.modules():
        if isinstance(module, APTAdapter):
            module.free_tail()
        elif isinstance(module, EmptyAttention):
            module.dense = ()


def _stored_units(group: UnitGroup) -> int:
    """Units that the weights store: the live ones, and those of a tail."""
    return group.reader.weight.shape[1] // group.gate.unit_size


def _prune_hidden(
    group: HiddenGroup,
    transform: LayerTransform | None,
    positions: list[int],
    optimizer: torch.optim.Optimizer | None,
    keep_tail: bool,
) -> None:
    """Keep the dimensions `positions` in every part of the model, a tied weight once."""
    kept, live = torch.tensor(positions, dtype=torch.long, device=group.gate.mask.device), group.num_units
    done: set[tuple[int, int]] = set()

    def cut(tensor: Tensor | None, dim: int, keep_tail: bool = keep_tail) -> None:
        if tensor is None or (id(tensor), dim) in done:
            return
        done.add((id(tensor), dim))
        tail = keep_tail and not tensor.requires_grad  # what trains has moments, and a teacher its own copy of it
        index = _retained_first(kept, live, tensor.shape[dim]) if tail else kept
        _follow(tensor, lambda t: t.index_select(dim, index), optimizer)

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
    stored = group.gate.order.numel()
    order = _retained_first(kept, live, stored) if keep_tail else None
    if transform is not None:  # from the student's dimensions to those of its teacher
        _follow(transform.lora_A, lambda t: t.index_select(1, kept), optimizer)
        _follow(transform.lora_B, lambda t: t.index_select(0, kept if order is None else order), optimizer)
    group.gate.keep(kept, order)


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
        _follow(tensor, lambda t: t.index_select(dim, features), optimizer)


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


def apply_rank_plan(model: nn.Module, plan: RankPlan, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Raise the ranks that the plan names; the output of the model does not change.

    New rows start with first moment 0 and second moment at the mean over the rank axis of the surviving ranks: with
    zeros there, the one step count that AdamW keeps per parameter would make them jump by several learning rates.

    Raises:
        ValueError: the plan names an adapter that the model does not have, or a rank that is not above the present one.
    """
    if optimizer is not None:
        check_optimizer(optimizer)
    adapters = dict(adapted(model))
    for name, rank in plan.ranks.items():
        if name not in adapters:
            raise ValueError(
                f"surgery: the plan of step {plan.step} names adapter {name}, which this model does not have"
            )
        adapter = adapters[name]
        sides = [(p, dim) for p, dim in ((adapter.lora_A, 0), (adapter.lora_B, 1)) if p is not None]
        before = [(parameter.grad, moments(parameter, optimizer)) for parameter, _ in sides]
        for parameter, _ in sides:
            parameter.grad = None
        num = rank - adapter.rank
        adapter.increase_rank(rank, "gaussian")
        for (parameter, dim), (grad, kept) in zip(sides, before, strict=True):
            parameter.grad = None if grad is None else grown("grad", grad, dim, num)
            for key, value in kept:
                state_of(optimizer, parameter)[key] = grown(key, value, dim, num)


@torch.no_grad()
def apply_trim_plan(model: nn.Module, plan: TrimPlan, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Remove the ranks that the plan does not keep; moments follow. A rank whose gate is 0 adds nothing.

    Raises:
        ValueError: the plan names an adapter without removable ranks, or positions that it does not have.
    """
    if optimizer is not None:
        check_optimizer(optimizer)
    adapters = dict(adapted(model))
    for name, positions in plan.kept.items():
        delta = adapters[name].delta if name in adapters else None
        count = delta.rank if delta is not None and delta.rank_side() else 0
        if not count or positions != sorted(set(positions)) or not all(0 <= p < count for p in positions):
            raise ValueError(f"surgery: kept ranks of {name} must ascend and lie below its {count} removable ones")
    for name, positions in plan.kept.items():
        adapter = adapters[name]
        assert adapter.delta is not None
        if not positions:
            _drop_adapter(adapter, optimizer)
            continue
        kept = torch.tensor(positions, dtype=torch.long, device=adapter.weight.device)
        for tensor, dim in adapter.delta.rank_side():
            _follow(tensor, partial(torch.index_select, dim=dim, index=kept), optimizer)
        adapter.delta.settle()


def _follow(parameter: Tensor, transform: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer | None) -> None:
    """Change a parameter (or a buffer), its gradient and every moment of it in the same way."""
    kept = moments(parameter, optimizer)
    grad, parameter.grad = parameter.grad, None
    exchange(parameter, transform(parameter.data))
    if grad is not None:
        parameter.grad = transform(grad)
    for key, value in kept:
        state_of(optimizer, parameter)[key] = transform(value)


def _drop_adapter(linear: APTAdapter, optimizer: torch.optim.Optimizer | None) -> None:
    """Remove an adapter whose layer is empty, from the optimizer too."""
    forget(linear.adapter_parameters(), optimizer)
    linear.drop_adapter()


def forget(parameters: Iterable[nn.Parameter], optimizer: torch.optim.Optimizer | None) -> None:
    """Take parameters that are gone out of the optimizer, with their moments; the groups stay."""
    gone = {id(parameter) for parameter in parameters}
    if optimizer is not None and gone:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) in gone:
                    optimizer.state.pop(parameter, None)
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in gone]
