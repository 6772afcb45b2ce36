"""Carries out plans of ranks that grow or go, on model and optimizer together."""

from functools import partial

import torch
from torch import nn

from apt.layers import APTAdapter, adapted
from apt.records import RankPlan, TrimPlan
from apt.surgery.moments import check_optimizer, follow, forget, grown, moments, state_of


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
            drop_adapter(adapter, optimizer)
            continue
        kept = torch.tensor(positions, dtype=torch.long, device=adapter.weight.device)
        for tensor, dim in adapter.delta.rank_side():
            follow(tensor, partial(torch.index_select, dim=dim, index=kept), optimizer)
        adapter.delta.settle()


def drop_adapter(linear: APTAdapter, optimizer: torch.optim.Optimizer | None) -> None:
    """Remove an adapter whose layer is empty, from the optimizer too."""
    forget(linear.adapter_parameters(), optimizer)
    linear.drop_adapter()
