"""What lies behind the kept part of each weight, where a dense teacher reads it: found, and freed."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from apt.families import EmptyAttention
from apt.layers import TRANSFORM, APTAdapter, adapted, exchange
from apt.layers.hidden import HiddenNorm
from apt.pruning.dimensions import HiddenGroup, hidden_group
from apt.surgery.moments import follow
from apt.surgery.state import patch_state


def live_views(model: nn.Module, group: HiddenGroup | None) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Every parameter that may have a tail, with its live part; a tied one once. `group` None: linears alone."""
    owned: list[Any] = [module for _, module in adapted(model)]
    pairs = [(module.weight, module.view()[0]) for module in owned]
    pairs += [(module.bias, module.view()[1]) for module in owned]
    for part in group.parts if group is not None else ():
        module: Any = part.module
        if part.kind == "norm":
            pairs += zip((module.weight, module.bias), module.view(), strict=True)
        elif part.kind == "embedding" and group is not None:
            pairs.append((module.weight, module.weight[:, : group.num_units]))
    seen: set[int] = set()
    for stored, live in pairs:
        if stored is not None and id(stored) not in seen:
            seen.add(id(stored))
            yield stored, live


def free_dimension_tails(group: HiddenGroup) -> None:
    """Give back what lies behind the live part of norms and embeddings; linears have a method for it."""
    for part in group.parts:
        module: Any = part.module
        if part.kind == "norm" and module.n < module.weight.numel():
            for parameter, live in zip((module.weight, module.bias), module.view(), strict=True):
                if parameter is not None:
                    exchange(parameter, live.detach().clone())
            fit_norm(module)
        elif part.kind == "embedding" and module.weight.shape[1] > group.num_units:
            exchange(module.weight, module.weight.detach()[:, : group.num_units].clone())
            module.embedding_dim = group.num_units
    group.mask.order = torch.arange(group.num_units, device=group.mask.order.device)


def fit_norm(norm: HiddenNorm) -> None:
    """Tell the plain norm inside how wide its parameters are now."""
    if isinstance(norm.stock, nn.LayerNorm):
        norm.stock.normalized_shape = (norm.weight.numel(),)


@torch.no_grad()
def free_tails(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Give back what `keep_tail` left behind: no teacher reads the dense weights any more."""
    transform = getattr(model, TRANSFORM, None)
    group = hidden_group(patch_state(model).anatomy)
    if group is not None:
        free_dimension_tails(group)
        if transform is not None:
            follow(transform.lora_B, lambda t: t[: group.num_units].clone(), optimizer)
    for module in model.modules():
        if isinstance(module, APTAdapter):
            module.free_tail()
        elif isinstance(module, EmptyAttention):
            module.dense = ()
