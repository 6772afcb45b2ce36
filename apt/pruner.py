"""Scores and a budget -> which units stay. Decides only; `apt.surgery` acts."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from apt.dimensions import Group
from apt.hidden import SITES
from apt.prices import Prices
from apt.records import PrunePlan
from apt.salience import KURTOSES, SALIENCES
from apt.schedule import Point, SparsityScheduler

UNIT_TYPES = ("head", "neuron", "hidden")
BALANCES = ("type", "none")
LAYOUTS = ("free", "uniform")
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
    round_to: int = 8  # neurons of a layer, and hidden dimensions, come in multiples of this
    min_heads: int = 0  # KV groups every layer keeps
    min_neurons: int = 0  # neurons every layer keeps
    min_hidden: int = 8  # hidden dimensions the model keeps, at least 1
    unit_types: tuple[str, ...] = ("head", "neuron")  # what is pruned; "hidden" dimensions too where they are named
    hidden_sites: str = "read"  # where hidden dimensions are scored: "read" by a layer, or "write", output and down
    prune_before_tuning: bool = False  # all at once before step 1, from static scores; no pruning event comes later
    calibration_batches: int = 32  # of training data, summed into these scores; at least 1
    salience: str = "product_of_sums"  # of a unit; "sum_of_products", "gate_taylor" keep activations; or "magnitude"
    kurtosis: str | None = None  # added to it: "off", "paper", "normalized", "original"; null: paper in decoders only
    balance: str = "type"  # "type": densities over the mean of their kind of unit; "none": as they are
    layout: str = "free"  # "free": each layer its own counts; "uniform": as many heads and neurons in every layer

    def __post_init__(self) -> None:
        if not 0.0 <= self.target_sparsity < 1.0:
            raise ValueError(f"pruning: target_sparsity must be in [0, 1), got {self.target_sparsity}")
        object.__setattr__(self, "unit_types", tuple(self.unit_types))
        if not self.unit_types or not set(self.unit_types) <= set(UNIT_TYPES):
            raise ValueError(f"pruning: unit_types must be some of {list(UNIT_TYPES)}, got {list(self.unit_types)}")
        choices = {
            "salience": SALIENCES,
            "hidden_sites": SITES,
            "kurtosis": (None, *KURTOSES),
            "balance": BALANCES,
            "layout": LAYOUTS,
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"pruning: {name} must be one of {list(known)}, got {getattr(self, name)!r}")
        for name in ("prune_start", "sparsity_warmup", "prune_end", "decay", "settle"):
            point = getattr(self, name)
            if point < 0 or (isinstance(point, float) and point > 1.0):
                raise ValueError(f"pruning: {name} must be a fraction in [0, 1] or a number of steps, got {point}")
        if self.num_events < 0 or self.min_heads < 0 or self.min_neurons < 0:
            raise ValueError("pruning: num_events, min_heads and min_neurons must be at least 0")
        if self.round_to < 1 or self.min_hidden < 1:
            raise ValueError("pruning: round_to and min_hidden must be at least 1")
        if self.calibration_batches < 1:
            raise ValueError(f"pruning: calibration_batches must be at least 1, got {self.calibration_batches}")
        if self.salience == "magnitude" and self.kurtosis not in (None, "off"):
            raise ValueError(
                f"pruning: salience 'magnitude' takes no statistics, so kurtosis must be 'off', got {self.kurtosis!r}"
            )
        if self.num_events == 0 and self.target_sparsity > 0.0 and not self.prune_before_tuning:
            raise ValueError(f"pruning: target_sparsity {self.target_sparsity} needs num_events of at least 1, got 0")

    def schedule(self, total_steps: int) -> SparsityScheduler:
        """The schedule of a run of that many optimizer steps; a run that is too short raises ValueError.

        With `prune_before_tuning` it has no events: all is done before step 1.
        """
        return SparsityScheduler(
            total_steps,
            self.target_sparsity,
            prune_start=self.prune_start,
            prune_end=self.prune_end,
            sparsity_warmup=self.sparsity_warmup,
            num_events=0 if self.prune_before_tuning else self.num_events,
            decay=self.decay,
            settle=self.settle,
        )


class AdaptivePruner:
    """Global search over salience densities under a parameter budget (method.md 3).

    Units are ranked by salience over parameters, all layers and kinds together, and the longest prefix that fits the
    budget stays. Neurons and hidden dimensions are ranked in bundles of `round_to`, filled in order of their score, so
    that the counts come out rounded and one pass is enough. Densities are taken at the present sizes; what a set of
    heads, neurons and dimensions costs together is exact (`Prices`). Of equal densities the earlier group and position
    comes first. The sparsity reached passes the target by less than one unit, or bundle, of one layer.

    In a uniform layout the best bundle of every layer is one entry of the ranking, the second best of every layer
    another, and so on. Such a row costs as many times more as there are layers, several percent of a tiny model; so
    what the prefix leaves over is filled with later rows that fit, until neither a further head nor a further bundle
    of neurons in every layer would.

    Args:
        total: block parameters of the original model, the denominator of sparsity.
        config: floors, rounding, balance and layout.
    """

    def __init__(self, total: int, config: PruningConfig) -> None:
        self.total = total
        self.config = config

    def check(self, groups: list[Group], live: int) -> None:
        """Raise ValueError where there is nothing to prune, or target or layout cannot be had."""
        target = self.config.target_sparsity
        if not groups:
            raise ValueError("pruner: the model has no prunable units; every head and neuron is gone or none was found")
        lanes = self._lanes(groups)
        layers = {tuple(group.name.split(".")[:2]) for group in groups if group.kind != "hidden"}
        for lane in lanes:
            uneven = len({(group.num_units, group.cost()) for group in lane}) > 1
            missing = self.config.layout == "uniform" and lane[0].kind != "hidden" and len(lane) < _places(lane, layers)
            if uneven or missing:
                raise ValueError(
                    f"pruner: layout 'uniform' needs layers of equal size, but the {lane[0].kind}s of the layers are "
                    f"{[group.num_units for group in lane]}; set layout to 'free'"
                )
        present = np.array([lane[0].num_units for lane in lanes])
        floors = np.array([self._floor(lane) for lane in lanes])
        prices, every = Prices.of(lanes), np.arange(len(lanes))
        free = int(prices.spent(every, present)[-1] - prices.spent(every, floors)[-1])
        reachable = 1.0 - (live - free) / self.total
        if target > reachable:
            hidden = f", min_hidden={self.config.min_hidden}" if prices.dimensions else ""
            raise ValueError(
                f"pruner: target_sparsity {target} is not reachable; with min_heads={self.config.min_heads} and "
                f"min_neurons={self.config.min_neurons}{hidden} at most {int(reachable * 1000) / 1000} can go; "
                f"lower target_sparsity or the floors"
            )

    def _lanes(self, groups: list[Group]) -> list[list[Group]]:
        """The groups whose counts are one number: each alone, or in a uniform layout all of a kind."""
        if self.config.layout == "free":
            return [[group] for group in groups]
        return [[group for group in groups if group.kind == kind] for kind in dict.fromkeys(g.kind for g in groups)]

    def _bundle(self, lane: list[Group]) -> int:
        return 1 if lane[0].kind == "head" else self.config.round_to

    def _floor(self, lane: list[Group]) -> int:
        """Units of each group that stay whatever comes: the highest floor, filled up to whole bundles.

        In a uniform layout that is at least one bundle, as no stock configuration describes an empty layer.
        """
        floor, bundle = max(group.floor for group in lane), self._bundle(lane)
        if self.config.layout == "uniform":
            floor = max(1, floor)
        return min(lane[0].num_units, -(-floor // bundle) * bundle)

    def plan(self, groups: list[Group], scores: dict[str, Tensor], live: int, step: int, sparsity: float) -> PrunePlan:
        """The units that stay at a sparsity.

        Args:
            groups: unit groups at their present sizes.
            scores: salience per unit of each group, ``[num_units]``; infinite ones are worth most.
            live: block parameters that are left now.
            step: optimizer steps done.
            sparsity: fraction of the original block parameters that must be gone.

        Raises:
            ValueError: a score is NaN: no rank could be given to that unit.
        """
        lanes, orders, sizes, density, owner = self._lanes(groups), {}, [], [], []
        prices, present = Prices.of(lanes), np.array([lane[0].num_units for lane in lanes])
        fixed = live - int(prices.spent(np.arange(len(lanes)), present)[-1])
        budget = (1.0 - sparsity) * self.total - fixed
        for index, lane in enumerate(lanes):
            means = []
            for group in lane:
                orders[group.name], size, mean = _bundles(group.name, scores[group.name], self._bundle(lane))
                means.append(mean)
            sizes.append(size)
            density.append(np.mean(means, axis=0) / lane[0].cost())
            owner.append(np.full(len(size), index))
        if self.config.balance == "type":
            _divide_by_type_mean([lane[0].kind for lane in lanes], density, sizes)
        for lane, mean, size in zip(lanes, density, sizes, strict=True):
            mean[: np.searchsorted(np.cumsum(size), self._floor(lane), side="right")] = np.inf

        owners, counts = np.concatenate(owner), np.concatenate(sizes)
        ranked = np.argsort(-np.concatenate(density), kind="stable")
        taken = ranked[prices.within(owners[ranked], counts[ranked], budget)]
        if self.config.layout == "uniform":
            rest = ranked[~np.isin(ranked, taken) & ~prices.hidden[owners[ranked]]]
            dims = int(counts[taken][prices.hidden[owners[taken]]].sum())
            left = budget - (prices.spent(owners[taken], counts[taken])[-1] if len(taken) else 0)
            taken = np.append(taken, _fill(rest, owners, counts * prices.at(dims)[owners], left))
        kept = np.bincount(owners[taken], weights=counts[taken], minlength=len(lanes)).astype(int)
        return PrunePlan(
            step=step,
            target_sparsity=sparsity,
            round_to=self.config.round_to,
            kept={
                g.name: np.sort(orders[g.name][:n]).tolist() for lane, n in zip(lanes, kept, strict=True) for g in lane
            },
        )


def _places(lane: list[Group], layers: set[tuple[str, ...]]) -> int:
    """Groups that such a lane would have if no layer had lost all its units of that kind."""
    parts = {(group.name.split(".")[0], group.name.split(".")[-1]) for group in lane}
    return sum(stack == other for stack, _ in parts for other, _ in layers)


def _bundles(
    name: str, scores: Tensor, bundle: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Positions by falling score, the size of each bundle of neighbours in that order, and its mean score."""
    # An infinite score is worth most, and still leaves room to add and divide.
    values = scores.detach().to("cpu", torch.float64).numpy().clip(-LARGEST, LARGEST)
    if np.isnan(values).any():
        raise ValueError(
            f"pruner: {np.isnan(values).sum()} of the {len(values)} scores of {name} are NaN, so its units cannot be "
            f"ranked; look at what made them"
        )
    order = np.argsort(-values, kind="stable")
    starts = np.arange(0, len(values), bundle)
    sizes = np.diff(np.append(starts, len(values)))
    mean = np.add.reduceat(values[order], starts) / sizes
    return order, sizes, np.minimum.accumulate(mean)  # rounding must not put a later bundle before an earlier one


def _fill(
    rest: NDArray[np.int64], owners: NDArray[np.int64], costs: NDArray[np.int64], left: float
) -> NDArray[np.int64]:
    """Of the entries after the prefix those that still fit, each lane's in order: then no lane's next one does."""
    taken: list[int] = []
    closed: set[int] = set()
    for entry in rest.tolist():
        if owners[entry] not in closed and costs[entry] <= left:
            taken.append(entry)
            left -= costs[entry]
        else:
            closed.add(owners[entry])
    return np.array(taken, dtype=np.int64)


def _divide_by_type_mean(kinds: list[str], density: list[NDArray[np.float64]], sizes: list[NDArray[np.int64]]) -> None:
    """Divide densities by their mean over all units of the same kind, so that kinds compete on equal terms."""
    for kind in set(kinds):
        mine = [index for index, other in enumerate(kinds) if other == kind]
        mean = np.average(np.concatenate([density[i] for i in mine]), weights=np.concatenate([sizes[i] for i in mine]))
        if mean > 0.0:
            for index in mine:
                density[index] /= mean
