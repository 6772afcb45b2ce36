"""Adapted linears that read one tensor, computed together."""

from typing import Any

import torch
from torch import Tensor

import apt_kernels
from apt.layers.adapter import APTAdapter
from apt.layers.weak import WeakModules
from apt.process.per_thread import PerThread


class _Pending(PerThread):
    """Outputs of the latest input that were not asked for yet."""

    def __init__(self) -> None:
        self.x: Tensor | None = None
        self.with_grad = False
        self.outputs: list[Tensor | None] | None = None


class SharedInput:
    """Adapted linears that read the same tensor (q, k, v; gate, up): the first one called computes all of them.

    The block's own forward calls them one after the other, as it always did; those called later find their output
    here. It is kept for that one input and that thread only, and handed out once.

    Args:
        members: the linears, none with a gate on its input. `share_input` lets them know of it.
    """

    def __init__(self, members: list[APTAdapter]) -> None:
        self.members = WeakModules(members)
        self._pending = _Pending()

    def together(self, member: Any) -> bool:
        """Whether the op that computes all of them can: A and B alone, one scale. Without any there is no need.

        A replica of a member on another device has weights of its own, and no others beside it: it is computed alone,
        as is one that is left of those that were tied.
        """
        members = self.members.alive()
        if len(members) < len(self.members) or members[member.place].weight is not member.weight:
            return False
        adapted = [other for other in members if other.rank]
        plain = all(other.delta is None and not other.drops for other in adapted)
        return bool(adapted) and plain and len({other.scale for other in adapted}) == 1

    def output(self, member: Any, x: Tensor) -> Tensor:
        """What this member makes of x."""
        pending = self._pending
        place = member.place
        outputs = pending.outputs if pending.x is x and pending.with_grad == torch.is_grad_enabled() else None
        found = None if outputs is None else outputs[place]
        if outputs is None or found is None:
            outputs = list(self._compute(x))  # may raise, so it comes first
            pending.x = x
            pending.with_grad = torch.is_grad_enabled()
            pending.outputs = outputs
            found = outputs[place]
            assert found is not None
        outputs[place] = None
        if all(output is None for output in outputs):
            pending.x = None
            pending.outputs = None
        return found

    def _compute(self, x: Tensor) -> list[Tensor]:
        members = self.members.alive()
        views = [member.view() for member in members]
        factors = [member.factors() for member in members]
        return apt_kernels.masked_lora_linears(
            x,
            [weight for weight, _ in views],
            [a for a, _ in factors],
            [b for _, b in factors],
            scale=next(member.scale for member in members if member.rank),
            biases=[bias for _, bias in views],
        )


def share_input(members: list[APTAdapter]) -> SharedInput:
    """Tie linears that read the same tensor, so that the first one called computes all of them."""
    shared = SharedInput(members)
    for place, member in enumerate(members):
        member.shared = shared
        member.place = place
    return shared
