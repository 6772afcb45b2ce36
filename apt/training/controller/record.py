"""An event as it is written down: what it asked for, what is left after it, how long it took."""

import time
from typing import Any

from torch import nn

from apt.pruning.units import block_params
from apt.records import Event
from apt.surgery import patch_state


def live_params(model: nn.Module) -> int:
    """What is left of the block parameters of a patched model; 0 where its family is not known."""
    anatomy = patch_state(model).anatomy
    return 0 if anatomy is None else block_params(anatomy)


def event_now(model: nn.Module, step: int, started: float, before: int, **told: Any) -> Event:
    """The record of an event that was carried out just now.

    Args:
        model: patched.
        step: optimizer steps done.
        started: when it began, in seconds of `time.perf_counter`.
        before: `live_params` at that time.
        told: plans, and what was asked and predicted, by the fields of `Event`.
    """
    live, total = live_params(model), patch_state(model).block_params
    return Event(
        step=step,
        sparsity=1.0 - live / total if total else 0.0,
        removed=(before - live) / total if total else 0.0,
        block_params=live,
        trainable_params=sum(p.numel() for p in model.parameters() if p.requires_grad),
        seconds=time.perf_counter() - started,
        **told,
    )
