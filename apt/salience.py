"""Statistics -> scores of units and adapters, and their moving averages."""

import torch
from torch import Tensor

from apt.adapters import APTAdapter
from apt.units import UnitGroup

SALIENCES = ("product_of_sums", "sum_of_products", "gate_taylor")


def unit_scores(group: UnitGroup, grad_scale: float = 1.0, salience: str = "product_of_sums") -> Tensor:
    """Salience of each unit: ``[num_units]``, float32.

    With h the unit's features at its gate, y what leaves the gate, and sums over the valid tokens of the step::

        product_of_sums   sum over features of mean|h| * sum|dL/dy|    (APT, arXiv 2401.12200, eq. 4, Algorithm 1)
        sum_of_products   sum over features and tokens of |h * dL/dy|
        gate_taylor       |sum over features and tokens of h * dL/dy|, which is |dL/dmask| of an open unit

    The mean divides the product once by the number of tokens: for a mean-reduced loss no score depends on batch size
    or padding.

    Args:
        group: its gate holds the sums of one optimizer step (all its micro-batches), of the kind that `salience` needs.
        grad_scale: the loss scaler's factor on the gradients.
        salience: one of `SALIENCES`.
    """
    first_D, second_D = group.gate.sums
    if salience == "product_of_sums":
        features_D = first_D * second_D / (group.gate.count.clamp(min=1.0) * grad_scale)
    else:
        features_D = (first_D if salience == "sum_of_products" else second_D) / grad_scale
    units: Tensor = features_D.view(-1, group.gate.unit_size).sum(1)
    return units.abs() if salience == "gate_taylor" else units


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
