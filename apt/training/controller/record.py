"""An event as it is written down: what it asked for, what is left after it, how long it took."""

import time
from collections.abc import Sequence
from typing import TypeVar

from torch import nn

from apt.families import known_anatomy
from apt.pruning.units import block_params
from apt.records import Event, Plan, PrunePlan, RankPlan, Target, TrimPlan
from apt.surgery import patch_state

Kind = TypeVar("Kind", PrunePlan, RankPlan, TrimPlan)


def live_params(model: nn.Module) -> int:
    """What is left of the block parameters of a patched model; 0 where its family is not known."""
    anatomy = known_anatomy(model)
    return 0 if anatomy is None else block_params(anatomy)


def record_event(
    model: nn.Module,
    step: int,
    plans: Sequence[Plan],
    target: Target,
    predicted_speedup: float | None,
    *,
    started: float,
    before: int,
) -> Event:
    """The record of an event that was carried out just now.

    Args:
        model: patched.
        step: optimizer steps done.
        plans: of the event, at most one of each kind.
        target: what was asked for.
        predicted_speedup: of a forward pass after it; None: parameters are the goal.
        started: when it began, in seconds of `time.perf_counter`.
        before: `live_params` at that time.
    """
    live = live_params(model)
    total = patch_state(model).block_params
    return Event(
        step=step,
        prune=_find_plan(PrunePlan, plans),
        rank=_find_plan(RankPlan, plans),
        trim=_find_plan(TrimPlan, plans),
        target_sparsity=target.sparsity,
        target_speedup=target.speedup,
        predicted_speedup=predicted_speedup,
        sparsity=1.0 - live / total if total else 0.0,
        removed=(before - live) / total if total else 0.0,
        block_params=live,
        trainable_params=sum(p.numel() for p in model.parameters() if p.requires_grad),
        seconds=time.perf_counter() - started,
    )


def _find_plan(kind: type[Kind], plans: Sequence[Plan]) -> Kind | None:
    """The plan of a kind; None where there is none."""
    return next((plan for plan in plans if isinstance(plan, kind)), None)
