"""Unit groups as the search sees them, without a model, and scores that a search might stumble over."""

from dataclasses import dataclass

import torch

ADVERSARIAL = {
    "random": lambda n: torch.rand(n),
    "lognormal": lambda n: torch.randn(n).mul(5).exp(),
    "all equal": lambda n: torch.full((n,), 0.1),
    "all zero": lambda n: torch.zeros(n),
    "ties": lambda n: torch.randint(0, 3, (n,)).float(),
    "some inf": lambda n: torch.rand(n).masked_fill(torch.rand(n) < 0.1, float("inf")),
    "all inf": lambda n: torch.full((n,), float("inf")),
    "tiny": lambda n: torch.rand(n) * 1e-38,
    "huge": lambda n: torch.rand(n) * 3e38,
}


@dataclass
class Group:
    """What the search sees of a group of units."""

    name: str
    kind: str
    num_units: int
    unit_cost: int
    floor: int = 0
    inside: int = 0  # of a layer: what the units in it cost

    @property
    def holder(self) -> str:
        return self.name.rpartition(".")[0]

    def cost(self) -> int:
        return self.unit_cost

    def whole_cost(self) -> int:
        return self.unit_cost + self.inside


def groups_of(*, neurons: int = 96, floor_heads: int = 0, floor_neurons: int = 0, layers: int = 4) -> list[Group]:
    return [
        group
        for i in range(layers)
        for group in (
            Group(f"layers.{i}.heads", "head", 12, 196, floor_heads),
            Group(f"layers.{i}.neurons", "neuron", neurons, 15, floor_neurons),
        )
    ]


FIXED = 333  # norms and biases: live whatever the plan


def total_of(groups: list[Group]) -> int:
    return FIXED + sum(group.num_units * group.cost() for group in groups)
