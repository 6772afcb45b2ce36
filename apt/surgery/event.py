"""Carries out the plans of an event: in a run, or replayed onto a freshly patched model."""

import torch
from torch import nn

from apt.records import Event
from apt.surgery.prune import apply_prune_plan
from apt.surgery.ranks import apply_rank_plan, apply_trim_plan


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
