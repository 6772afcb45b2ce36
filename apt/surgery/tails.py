"""What lies behind the kept part of each weight, where a dense teacher reads it: found, and freed."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from apt.families import StandIn, known_anatomy
from apt.families.hidden_parts import HiddenPart
from apt.layers import TRANSFORM, APTAdapter, adapted, exchange
from apt.pruning.dimensions import HiddenGroup, hidden_group
from apt.surgery.hidden import tell_width
from apt.surgery.moments import follow


def live_views(model: nn.Module, group: HiddenGroup | None) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Every parameter that may have a tail, with its live part; a tied one once. `group` None: linears alone."""
    owned: list[Any] = [module for _, module in adapted(model)]
    pairs = [(module.weight, module.view()[0]) for module in owned]
    pairs += [(module.bias, module.view()[1]) for module in owned]
    if group is not None:
        for part in _beside_linears(group):
            pairs += [(tensor, tensor.narrow(axis, 0, group.num_units)) for tensor, axis in part.tensors()]
    seen: set[int] = set()
    for stored, live in pairs:
        if stored is not None and id(stored) not in seen:
            seen.add(id(stored))
            yield stored, live


def free_dimension_tails(group: HiddenGroup) -> None:
    """Give back what lies behind the live part of norms and embeddings; linears have a method for it."""
    for part in _beside_linears(group):
        for tensor, axis in part.tensors():
            if tensor.shape[axis] > group.num_units:
                exchange(tensor, tensor.detach().narrow(axis, 0, group.num_units).clone())
        tell_width(part, group.num_units)
    group.mask.order = torch.arange(group.num_units, device=group.mask.order.device)


def _beside_linears(group: HiddenGroup) -> list[HiddenPart]:
    return [part for part in group.parts if part.kind != "linear"]


@torch.no_grad()
def free_tails(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Give back what `keep_tail` left behind: no teacher reads the dense weights any more."""
    transform = getattr(model, TRANSFORM, None)
    group = hidden_group(known_anatomy(model))
    if group is not None:
        free_dimension_tails(group)
        if transform is not None:
            follow(transform.lora_B, lambda t: t[: group.num_units].clone(), optimizer)
    for module in model.modules():
        if isinstance(module, APTAdapter):
            module.free_tail()
        elif isinstance(module, StandIn):
            module.dense = ()
