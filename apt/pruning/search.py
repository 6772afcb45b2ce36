"""The search: scores and a budget -> which units stay."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from apt.pruning.config import PruningConfig
from apt.pruning.dimensions import Group
from apt.pruning.kinds import UNIT_KINDS
from apt.pruning.latency_table import LatencyTable, TimePrices
from apt.pruning.prices import Prices
from apt.records import PrunePlan

LARGEST = 1e200  # stands for an infinite score


class UnitSearch:
    """Global search over salience densities under a budget of parameters, or of time (method.md 3).

    Units are ranked by salience over parameters, all layers and kinds together, and the longest prefix that fits the
    budget stays. Neurons and hidden dimensions are ranked in bundles of `round_to`, filled in order of their score, so
    that the counts come out rounded and one pass is enough. Densities are taken at the present sizes; what a set of
    heads, neurons and dimensions costs together is exact (`Prices`). Of equal densities the earlier group and position
    comes first. The sparsity reached passes the target by less than one unit, or bundle, of one layer.

    In a uniform layout the best bundle of every layer is one entry of the ranking, the second best of every layer
    another, and so on. Such a row costs as many times more as there are layers, several percent of a tiny model; so
    what the prefix leaves over is filled with later rows that fit, until neither a further head nor a further bundle
    of neurons in every layer would.

    With a latency table milliseconds take the place of parameters, in densities and budget; "sparsity" is then the
    fraction of the time of a forward pass that is saved.

    Args:
        total: block parameters of the original model, the denominator of sparsity; with a table its `dense_ms`.
        config: floors, rounding, balance and layout.
        table: prices units by time.
    """

    def __init__(self, total: float, config: PruningConfig, table: LatencyTable | None = None) -> None:
        self.total = total
        self.config = config
        self.table = table

    def _prices(self, lanes: list[list[Group]]) -> Prices | TimePrices:
        return Prices.of(lanes) if self.table is None else TimePrices.of(lanes, self.table)

    def check(self, groups: list[Group], live: float) -> None:
        """Raise ValueError where there is nothing to prune, or target or layout cannot be had."""
        if not groups:
            raise ValueError("pruner: the model has no prunable units; every head and neuron is gone or none was found")
        lanes = self._lanes(groups)
        layers = {tuple(group.name.split(".")[:2]) for group in groups if not UNIT_KINDS[group.kind].across_layers}
        for lane in lanes:
            uneven = len({(group.num_units, group.cost()) for group in lane}) > 1
            in_layers = not UNIT_KINDS[lane[0].kind].across_layers
            missing = self.config.layout == "uniform" and in_layers and len(lane) < _places(lane, layers)
            if uneven or missing:
                raise ValueError(
                    f"pruner: layout 'uniform' needs layers of equal size, but the {lane[0].kind}s of the layers are "
                    f"{[group.num_units for group in lane]}; set layout to 'free'"
                )
        present = np.array([lane[0].num_units for lane in lanes])
        floors = np.array([self._floor(lane) for lane in lanes])
        prices, every = self._prices(lanes), np.arange(len(lanes))
        free = prices.spent(every, present)[-1] - prices.spent(every, floors)[-1]
        reachable = float(1.0 - (live - free) / self.total)
        if self.config.target_saving > reachable:
            raise ValueError(self._out_of_reach(reachable, prices.dimensions > 0))

    def _out_of_reach(self, reachable: float, hidden: bool) -> str:
        config = self.config
        floors = f"min_heads={config.min_heads} and min_neurons={config.min_neurons}"
        floors += f", min_hidden={config.min_hidden}" if hidden else ""
        if self.table is None or config.target_speedup is None:
            most = int(reachable * 1000) / 1000
            return (
                f"pruner: target_sparsity {config.target_sparsity} is not reachable; with {floors} at most {most} can "
                f"go; lower target_sparsity or the floors"
            )
        most = int(1000 / (1.0 - reachable)) / 1000
        return (
            f"pruner: target_speedup {config.target_speedup} is not reachable; with {floors} a forward pass of "
            f"{self.table.batch_size} x {self.table.length} tokens becomes at most {most} times as fast on "
            f"{self.table.device}; lower target_speedup or the floors"
        )

    def _lanes(self, groups: list[Group]) -> list[list[Group]]:
        """The groups whose counts are one number: each alone, or in a uniform layout all of a kind."""
        if self.config.layout == "free":
            return [[group] for group in groups]
        return [[group for group in groups if group.kind == kind] for kind in dict.fromkeys(g.kind for g in groups)]

    def _bundle(self, lane: list[Group]) -> int:
        return self.config.round_to if UNIT_KINDS[lane[0].kind].rounded else 1

    def _floor(self, lane: list[Group]) -> int:
        """Units of each group that stay whatever comes: the highest floor, filled up to whole bundles.

        In a uniform layout that is at least one bundle, as no stock configuration describes an empty layer.
        """
        floor, bundle = max(group.floor for group in lane), self._bundle(lane)
        if self.config.layout == "uniform":
            floor = max(1, floor)
        return min(lane[0].num_units, -(-floor // bundle) * bundle)

    def plan(
        self, groups: list[Group], scores: dict[str, Tensor], live: float, step: int, sparsity: float
    ) -> PrunePlan:
        """The units that stay at a sparsity.

        Args:
            groups: unit groups at their present sizes.
            scores: salience per unit of each group, ``[num_units]``; infinite ones are worth most.
            live: block parameters that are left now; with a table, milliseconds of a forward pass now.
            step: optimizer steps done.
            sparsity: fraction of the original block parameters, or of `dense_ms`, that must be gone.

        Raises:
            ValueError: a score is NaN: no rank could be given to that unit.
        """
        lanes, orders, sizes, density, owner = self._lanes(groups), {}, [], [], []
        prices, present = self._prices(lanes), np.array([lane[0].num_units for lane in lanes])
        fixed = live - prices.spent(np.arange(len(lanes)), present)[-1].item()
        budget = (1.0 - sparsity) * self.total - fixed
        for index, lane in enumerate(lanes):
            means = []
            for group in lane:
                orders[group.name], size, mean = _bundles(group.name, scores[group.name], self._bundle(lane))
                means.append(mean)
            sizes.append(size)
            density.append(np.mean(means, axis=0) / prices.unit[index])
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
            taken = np.append(taken, _fill(rest, owners, prices.each(owners, counts, dims), left))
        kept = np.bincount(owners[taken], weights=counts[taken], minlength=len(lanes)).astype(int)
        return PrunePlan(
            step=step,
            target_sparsity=sparsity if self.table is None else None,
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


def _fill(rest: NDArray[np.int64], owners: NDArray[np.int64], costs: NDArray[Any], left: float) -> NDArray[np.int64]:
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
