"""Statistics -> scores of units and adapters, and their moving averages."""

import torch
from torch import Tensor

from apt.adapters import APTAdapter
from apt.units import UnitGroup


def unit_scores(group: UnitGroup, grad_scale: float = 1.0) -> Tensor:
    """Salience of each unit: ``sum over its features of mean|h| * sum|dL/dy|``, ``[num_units]``, float32.

    The product of column sums (APT, arXiv 2401.12200, eq. 4, Algorithm 1), divided once by the number of valid tokens:
    for a mean-reduced loss it depends neither on batch size nor on padding.

    Args:
        group: its gate holds the sums of one optimizer step (all its micro-batches).
        grad_scale: the loss scaler's factor on the gradients.
    """
    h_D, g_D = group.gate.sums
    features_D: Tensor = h_D * g_D / (group.gate.count.clamp(min=1.0) * grad_scale)
    return features_D.view(-1, group.gate.unit_size).sum(1)


@torch.no_grad()
def adapter_importance(adapter: APTAdapter, grad_scale: float = 1.0) -> Tensor:
    """``sum_k |sum_i B_ik dL/dB_ik|``: signed inside a rank, summed over ranks (method.md 5.1); a scalar tensor."""
    assert adapter.lora_B is not None
    if adapter.lora_B.grad is None:
        return adapter.lora_B.new_zeros(())
    return (adapter.lora_B * adapter.lora_B.grad).sum(0).abs().sum() / grad_scale


class MovingAverage:
    """``S <- momentum S + (1 - momentum) s`` per name, from 0 and without bias correction (a common factor)."""

    def __init__(self, momentum: float) -> None:
        self.momentum = momentum
        self.values: dict[str, Tensor] = {}

    def update(self, new: dict[str, Tensor]) -> None:
        for name, value in new.items():
            old = self.values.get(name)
            self.values[name] = (1 - self.momentum) * value if old is None else torch.lerp(value, old, self.momentum)

    def keep(self, name: str, kept: Tensor) -> None:
        """Follow an event: only the positions `kept` stay."""
        if name in self.values:
            self.values[name] = self.values[name][kept]

    def reset(self) -> None:
        self.values.clear()
