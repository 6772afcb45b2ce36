"""Scores and a budget -> which units stay. Decides only; `apt.surgery` acts."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from apt.records import PrunePlan
from apt.schedule import Point, SparsityScheduler
from apt.units import UnitGroup

BALANCES = ("type", "none")
LARGEST = 1e200  # stands for an infinite score


@dataclass(frozen=True, kw_only=True)
class PruningConfig:
    """How much goes, when, and what must stay."""

    target_sparsity: float = 0.6  # fraction of the block parameters gone at the end, [0, 1)
    prune_start: Point = 0.02  # float: fraction of the run; int: optimizer step
    sparsity_warmup: Point = 0.0  # after prune_start, while only ranks grow
    prune_end: Point = 0.40  # the last event
    num_events: int = 5  # 0 or more
    decay: Point = 0.6  # masks fall for so long before an event; float: fraction of the interval; int: steps
    settle: Point = 0.2  # and rest at 0 or 1 for so long
    round_to: int = 8  # neurons of a layer come in multiples of this
    min_heads: int = 0  # KV groups every layer keeps
    min_neurons: int = 0  # neurons every layer keeps
    balance: str = "type"  # "type": densities over their mean among heads or among neurons; "none": as they are

    def __post_init__(self) -> None:
        if not 0.0 <= self.target_sparsity < 1.0:
            raise ValueError(f"pruning: target_sparsity must be in [0, 1), got {self.target_sparsity}")
        if self.balance not in BALANCES:
            raise ValueError(f"pruning: balance must be one of {list(BALANCES)}, got {self.balance!r}")
        for name in ("prune_start", "sparsity_warmup", "prune_end", "decay", "settle"):
            point = getattr(self, name)
            if point < 0 or (isinstance(point, float) and point > 1.0):
                raise ValueError(f"pruning: {name} must be a fraction in [0, 1] or a number of steps, got {point}")
        if self.num_events < 0 or self.round_to < 1 or self.min_heads < 0 or self.min_neurons < 0:
            raise ValueError("pruning: num_events, min_heads and min_neurons must be at least 0, round_to at least 1")
        if self.num_events == 0 and self.target_sparsity > 0.0:
            raise ValueError(f"pruning: target_sparsity {self.target_sparsity} needs num_events of at least 1, got 0")

    def schedule(self, total_steps: int) -> SparsityScheduler:
        """The schedule of a run of that many optimizer steps; a run that is too short raises ValueError."""
        return SparsityScheduler(
            total_steps,
            self.target_sparsity,
            prune_start=self.prune_start,
            prune_end=self.prune_end,
            sparsity_warmup=self.sparsity_warmup,
            num_events=self.num_events,
            decay=self.decay,
            settle=self.settle,
        )


class AdaptivePruner:
    """Global search over salience densities under a parameter budget (method.md 3).

    Units are ranked by salience over parameters, all layers and kinds together, and the longest prefix that fits the
    budget stays. Neurons are ranked in bundles of `round_to`, filled in order of their score, so that the counts come
    out rounded and one pass is enough.

    Args:
        total: block parameters of the original model, the denominator of sparsity.
        config: floors, rounding and balance.
    """

    def __init__(self, total: int, config: PruningConfig) -> None:
        self.total = total
        self.config = config

    def check(self, groups: list[UnitGroup], live: int) -> None:
        """Raise ValueError where there is nothing to prune, or the target cannot be reached under the floors."""
        target = self.config.target_sparsity
        if not groups:
            raise ValueError("pruner: the model has no prunable units; every head and neuron is gone or none was found")
        free = sum((group.num_units - self._floor(group)) * group.cost() for group in groups)
        reachable = 1.0 - (live - free) / self.total
        if target > reachable:
            raise ValueError(
                f"pruner: target_sparsity {target} is not reachable; with min_heads={self.config.min_heads} and "
                f"min_neurons={self.config.min_neurons} at most {int(reachable * 1000) / 1000} can go; "
                f"lower target_sparsity or the floors"
            )

    def _floor(self, group: UnitGroup) -> int:
        """Units that stay whatever comes: the group's floor, filled up to whole bundles."""
        bundle = self.config.round_to if group.kind == "neuron" else 1
        return min(group.num_units, -(-group.floor // bundle) * bundle)

    def plan(
        self, groups: list[UnitGroup], scores: dict[str, Tensor], live: int, step: int, sparsity: float
    ) -> PrunePlan:
        """The units that stay at a sparsity.

        Args:
            groups: unit groups at their present sizes.
            scores: salience per unit of each group, ``[num_units]``; NaN counts as 0.
            live: block parameters that are left now.
            step: optimizer steps done.
            sparsity: fraction of the original block parameters that must be gone.
        """
        fixed = live - sum(group.num_units * group.cost() for group in groups)
        budget = (1.0 - sparsity) * self.total - fixed
        orders, sizes, density, owner = [], [], [], []
        for index, group in enumerate(groups):
            bundle = self.config.round_to if group.kind == "neuron" else 1
            order, size, mean = _bundles(scores[group.name], bundle)
            mean = mean / group.cost()
            orders.append(order)
            sizes.append(size)
            density.append(mean)
            owner.append(np.full(len(size), index))
        if self.config.balance == "type":
            _divide_by_type_mean(groups, density, sizes)
        for group, mean, size in zip(groups, density, sizes, strict=True):
            mean[: np.searchsorted(np.cumsum(size), group.floor) + 1 if group.floor else 0] = np.inf

        owners, counts = np.concatenate(owner), np.concatenate(sizes)
        ranked = np.argsort(-np.concatenate(density), kind="stable")
        costs = np.array([group.cost() for group in groups], dtype=np.int64)
        spent = np.cumsum(counts[ranked] * costs[owners[ranked]])
        taken = ranked[: int(np.searchsorted(spent, budget, side="right"))]
        kept = np.bincount(owners[taken], weights=counts[taken], minlength=len(groups)).astype(int)
        return PrunePlan(
            step=step,
            target_sparsity=sparsity,
            round_to=self.config.round_to,
            kept={g.name: sorted(order[:n].tolist()) for g, order, n in zip(groups, orders, kept, strict=True)},
        )


def _bundles(scores: Tensor, bundle: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Positions by falling score, the size of each bundle of neighbours in that order, and its mean score."""
    # An infinite score is worth most, and still leaves room to add and divide.
    values = np.nan_to_num(scores.detach().to("cpu", torch.float64).numpy(), posinf=LARGEST, neginf=-LARGEST)
    order = np.argsort(-values, kind="stable")
    starts = np.arange(0, len(values), bundle)
    sizes = np.diff(np.append(starts, len(values)))
    mean = np.add.reduceat(values[order], starts) / sizes
    return order, sizes, np.minimum.accumulate(mean)  # rounding must not put a later bundle before an earlier one


def _divide_by_type_mean(
    groups: list[UnitGroup], density: list[NDArray[np.float64]], sizes: list[NDArray[np.int64]]
) -> None:
    """Divide densities by their mean over all units of the same kind, so that kinds compete on equal terms."""
    for kind in {group.kind for group in groups}:
        mine = [index for index, group in enumerate(groups) if group.kind == kind]
        mean = np.average(np.concatenate([density[i] for i in mine]), weights=np.concatenate([sizes[i] for i in mine]))
        if mean > 0.0:
            for index in mine:
                density[index] /= mean
