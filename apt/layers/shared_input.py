"""Adapted linears that read one tensor, computed together."""

from typing import Any

import torch
from torch import Tensor, nn

import apt_kernels
from apt.layers.adapter import APTAdapter


class SharedInput:
    """Adapted linears that read the same tensor (q, k, v; gate, up): the first one called computes all of them.

    The block's own forward calls them one after the other, as it always did; those called later find their output
    here. It is kept for that one input only, and handed out once.

    Args:
        members: the linears, none with a gate on its input. `share_input` lets them know of it.
    """

    def __init__(self, members: list[APTAdapter]) -> None:
        self.members = members
        self._forget()

    def _forget(self) -> None:
        self._x: Tensor | None = None
        self._with_grad = False
        self._outputs: list[Tensor | None] = [None] * len(self.members)

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle has the members and no outputs of a pass in flight."""
        return {"members": self.members}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.members = state["members"]
        self._forget()

    @property
    def together(self) -> bool:
        """Whether the op that computes all of them can: A and B alone, one scale. Without any there is no need."""
        adapted = [member for member in self.members if member.rank]
        plain = all(member.delta is None and not member.drops for member in adapted)
        return bool(adapted) and plain and len({member.scale for member in adapted}) == 1

    def output(self, member: nn.Module, x: Tensor) -> Tensor:
        """What this member makes of x."""
        index = next(i for i, other in enumerate(self.members) if other is member)
        found = self._outputs[index]
        if found is None or self._x is not x or self._with_grad != torch.is_grad_enabled():
            self._outputs = list(self._compute(x))  # may raise, so it comes first
            self._x = x
            self._with_grad = torch.is_grad_enabled()
            found = self._outputs[index]
            assert found is not None
        self._outputs[index] = None
        if all(output is None for output in self._outputs):
            self._x = None
        return found

    def _compute(self, x: Tensor) -> list[Tensor]:
        views = [member.view() for member in self.members]
        factors = [member.factors() for member in self.members]
        return apt_kernels.masked_lora_linears(
            x,
            [weight for weight, _ in views],
            [a for a, _ in factors],
            [b for _, b in factors],
            scale=next(member.scale for member in self.members if member.rank),
            biases=[bias for _, bias in views],
        )


def share_input(members: list[APTAdapter]) -> SharedInput:
    """Tie linears that read the same tensor, so that the first one called computes all of them."""
    shared = SharedInput(members)
    for member in members:
        member.shared = shared
    return shared
