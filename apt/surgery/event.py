"""Carries out a decision, in one way: in a run, or replayed onto a freshly patched model."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from apt.records import Event, Plan, PrunePlan, RankPlan, TrimPlan
from apt.surgery.prune import apply_prune_plan
from apt.surgery.ranks import apply_rank_plan, apply_trim_plan

Act = Callable[[nn.Module, Any, torch.optim.Optimizer | None, bool], None]  # model, plan, optimizer, keep_tail

ACTS: dict[type[Plan], Act] = {
    PrunePlan: lambda model, plan, optimizer, keep_tail: apply_prune_plan(model, plan, optimizer, keep_tail=keep_tail),
    RankPlan: lambda model, plan, optimizer, _: apply_rank_plan(model, plan, optimizer),
    TrimPlan: lambda model, plan, optimizer, _: apply_trim_plan(model, plan, optimizer),
}


def apply_plan(
    model: nn.Module, plan: Plan, optimizer: torch.optim.Optimizer | None = None, *, keep_tail: bool = False
) -> None:
    """Carry out a plan on model and optimizer.

    Args:
        model: patched.
        plan: of any kind.
        optimizer: its moments follow.
        keep_tail: whether the units that a plan cuts stay behind the kept part of each weight, for a teacher; ranks
            leave nothing behind.

    Raises:
        ValueError: the plan does not fit the model, or the optimizer cannot follow.
    """
    ACTS[type(plan)](model, plan, optimizer, keep_tail)


def apply_event(
    model: nn.Module, event: Event, optimizer: torch.optim.Optimizer | None = None, *, keep_tail: bool = False
) -> None:
    """Replay an event: carry out its plans, in their order; see `apply_plan`."""
    for plan in event.plans:
        apply_plan(model, plan, optimizer, keep_tail=keep_tail)
