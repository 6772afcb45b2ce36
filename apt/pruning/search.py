"""The search: scores and a budget -> which units stay."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from apt.pruning.config import PruningConfig
from apt.pruning.dimensions import Group
from apt.pruning.kinds import UNIT_KINDS
from apt.pruning.latency_table import LatencyTable, TimePrices
from apt.pruning.nested import is_layer, least_units, order_of_bundles, scale_influence
from apt.pruning.prices import Counts, Prices
from apt.pruning.units import UnitGroup
from apt.records import PrunePlan, UnitName

ROUNDING = 1e-12  # of the total: a budget that layers of one size meet exactly is met
LARGEST = 1e200  # stands for an infinite score


@dataclass(frozen=True)
class OrderedUnits:
    """The units of one group by falling score, equal ones by position."""

    positions: NDArray[np.int64]
    scores: NDArray[np.float64]


@dataclass(frozen=True)
class Bundles:
    """A table of bundles, one an entry of each array. `apt.pruning.prices` says what a bundle and a lane are."""

    lanes: Counts
    # Units of each in every group of its lane.
    sizes: Counts


class UnitSearch:
    """Global search over salience densities under a budget of parameters, or of time (method.md 3).

    Units are ranked by salience over parameters, all layers and kinds together, and the longest prefix that fits the
    budget stays. Neurons and hidden dimensions are ranked in bundles of `round_to`, filled in order of their score, so
    that the counts come out rounded and one pass is enough. Densities are taken at the present sizes; what a set of
    heads, neurons and dimensions costs together is exact (`Prices`). Of equal densities the earlier group and position
    comes first. The sparsity reached passes the target by less than one unit, or bundle, of one layer.

    A layer that may go holds units and is ranked before them (`apt.pruning.nested`): where it goes they are gone, and
    cost nothing. Of its own it costs what no unit takes.

    In a uniform layout the best bundle of every layer is one entry of the ranking, the second best of every layer
    another, and so on. Such a row costs as many times more as there are layers, several percent of a tiny model; so
    what the prefix leaves over is filled with later rows that fit, until neither a further head nor a further bundle
    of neurons in every layer would. Heads go there in the steps that a stock configuration can say: a bundle of them
    is what lies between two such counts.

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

    def check(self, groups: list[Group], live: float) -> None:
        """Raise ValueError where there is nothing to prune, or target or layout cannot be had."""
        if not groups:
            raise ValueError("pruner: the model has no prunable units; every head and neuron is gone or none was found")
        lanes = self._lanes(groups)
        if self.config.layout == "uniform":
            _refuse_unequal_layers(lanes)
        prices = self._prices(lanes)
        present = [lane[0].num_units for lane in lanes]
        least = least_units(lanes, [self._floor(lane) for lane in lanes], self.config.min_layers)
        free = _total_cost(prices, present) - _total_cost(prices, least)
        reachable = float(1.0 - (live - free) / self.total)
        if self.config.target_saving > reachable:
            raise ValueError(self._out_of_reach(reachable, prices.dimensions > 0))

    def _out_of_reach(self, reachable: float, hidden: bool) -> str:
        config = self.config
        floors = f"min_heads={config.min_heads} and min_neurons={config.min_neurons}"
        if config.layout == "uniform":
            floors += ", layout 'uniform' (heads as a stock configuration can say them)"
        floors += f", min_hidden={config.min_hidden}" if hidden else ""
        floors += f", min_layers={config.min_layers}" if any(kind.holds_units for kind in config.kinds) else ""
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
        """The groups that keep one common count: each alone, or in a uniform layout all of a kind; a layer is alone."""
        lanes: dict[str, list[Group]] = {}
        for group in groups:
            alone = self.config.layout == "free" or is_layer([group])
            lanes.setdefault(group.name if alone else group.kind, []).append(group)
        return list(lanes.values())

    def _prices(self, lanes: list[list[Group]]) -> Prices | TimePrices:
        return Prices.of(lanes) if self.table is None else TimePrices.of(lanes, self.table)

    def _ends(self, lane: list[Group]) -> Counts:
        """How many units each bundle of a lane ends with, of those before it and its own; ascending."""
        units = lane[0].num_units
        counts = lane[0].stock_counts() if self.config.layout == "uniform" and isinstance(lane[0], UnitGroup) else None
        if counts is not None:
            return np.array(counts, dtype=np.int64)
        size = self.config.round_to if UNIT_KINDS[lane[0].kind].rounded else 1
        return np.minimum(np.arange(size, units + size, size), units)

    def _floor(self, lane: list[Group]) -> int:
        """Units of each group that stay whatever comes: the highest floor, filled up to whole bundles.

        In a uniform layout that is at least one bundle, as no stock configuration describes an empty layer.
        """
        floor = max(group.floor for group in lane)
        if self.config.layout == "uniform" and not is_layer(lane):
            floor = max(1, floor)
        if floor == 0:
            return 0
        ends = self._ends(lane)
        return int(ends[min(int(np.searchsorted(ends, floor)), len(ends) - 1)])

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
        lanes = self._lanes(groups)
        prices = self._prices(lanes)
        ordered = {group.name: _order_units(group.name, scores[group.name]) for lane in lanes for group in lane}
        ranked = self._rank(lanes, ordered, prices)
        # What no unit takes is not the search's to spend.
        fixed = live - _total_cost(prices, [lane[0].num_units for lane in lanes])
        budget = (1.0 - sparsity) * self.total - fixed + ROUNDING * self.total
        taken = prices.longest_affordable_prefix(ranked.lanes, ranked.sizes, budget)
        if self.config.layout == "uniform":
            taken = _fill_up(ranked, taken, prices, budget)
        counts = np.bincount(ranked.lanes[taken], weights=ranked.sizes[taken], minlength=len(lanes)).astype(int)
        kept = {}
        for lane, count in zip(lanes, counts, strict=True):
            for group in lane:
                kept[group.name] = np.sort(ordered[group.name].positions[:count]).tolist()
        return PrunePlan(
            step=step,
            target_sparsity=sparsity if self.table is None else None,
            round_to=self.config.round_to,
            kept=kept,
        )

    def _rank(self, lanes: list[list[Group]], ordered: dict[str, OrderedUnits], prices: Prices | TimePrices) -> Bundles:
        """All bundles of all lanes by falling density, those below a floor first, none above its layer."""
        sizes = []
        densities = []
        for lane, price in zip(lanes, prices.price_per_unit, strict=True):
            ends = self._ends(lane)
            bundles = [_bundle_up(ordered[group.name], ends) for group in lane]
            sizes.append(bundles[0][0])
            densities.append(np.mean([score for _, score in bundles], axis=0) / price)
        if self.config.balance == "type":
            _divide_by_kind_mean([lane[0].kind for lane in lanes], densities, sizes)
        else:
            scale_influence(lanes, {name: units.scores for name, units in ordered.items()}, densities)
        for lane, density, size in zip(lanes, densities, sizes, strict=True):
            num_required = np.searchsorted(np.cumsum(size), self._floor(lane), side="right")
            density[:num_required] = np.inf
        lane_of_each = np.repeat(np.arange(len(lanes)), [len(size) for size in sizes])
        order = order_of_bundles(lanes, densities, self.config.min_layers)
        return Bundles(lane_of_each[order], np.concatenate(sizes)[order])


def _refuse_unequal_layers(lanes: list[list[Group]]) -> None:
    """Raise ValueError where the groups of a kind differ in size, or a layer has lost all its units of that kind."""
    in_layers = [lane for lane in lanes if UNIT_KINDS[lane[0].kind].timed]
    names = {group.name: UnitName.parse(group.name) for lane in in_layers for group in lane}
    layers = {(name.stack, name.layer) for name in names.values()}
    for lane in in_layers:
        parts = {(names[group.name].stack, names[group.name].units) for group in lane}
        # Groups that the lane would have if every layer still had its units of that kind.
        num_wanted = sum(stack == other for stack, _ in parts for other, _ in layers)
        num_shapes = len({(group.num_units, group.cost()) for group in lane})
        if num_shapes > 1 or len(lane) < num_wanted:
            raise ValueError(
                f"pruner: layout 'uniform' needs layers of equal size, but the {lane[0].kind}s of the layers are "
                f"{[group.num_units for group in lane]}; set layout to 'free'"
            )


def _total_cost(prices: Prices | TimePrices, counts: list[int]) -> float:
    """What so many units of each lane cost together."""
    total: float = prices.running_cost(np.arange(len(counts)), np.array(counts))[-1].item()
    return total


def _order_units(name: str, scores: Tensor) -> OrderedUnits:
    """The units of a group by falling score. Raises ValueError for one that is NaN."""
    # An infinite score is worth most, and still leaves room to add and divide.
    values = scores.detach().to("cpu", torch.float64).numpy().clip(-LARGEST, LARGEST)
    if np.isnan(values).any():
        raise ValueError(
            f"pruner: {np.isnan(values).sum()} of the {len(values)} scores of {name} are NaN, so its units cannot be "
            f"ranked; look at what made them"
        )
    order = np.argsort(-values, kind="stable")
    return OrderedUnits(order, values[order])


def _bundle_up(units: OrderedUnits, ends: Counts) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Size and mean score of each bundle of neighbours."""
    starts = np.append(0, ends[:-1])
    sizes = ends - starts
    means = np.add.reduceat(units.scores, starts) / sizes
    # Rounding must not put a later bundle before an earlier one.
    return sizes, np.minimum.accumulate(means)


def _fill_up(
    ranked: Bundles, taken: NDArray[np.int64], prices: Prices | TimePrices, budget: float
) -> NDArray[np.int64]:
    """Add to a prefix the later bundles that still fit, each lane's in order: then no lane's next one does."""
    left = budget
    if len(taken):
        left -= prices.running_cost(ranked.lanes[taken], ranked.sizes[taken])[-1]
    of_hidden = prices.hidden[ranked.lanes]
    num_dimensions = int(ranked.sizes[taken][of_hidden[taken]].sum())
    costs = prices.cost_of_each(ranked.lanes, ranked.sizes, num_dimensions)
    rest = np.setdiff1d(np.flatnonzero(~of_hidden), taken)
    added: list[int] = []
    closed: set[int] = set()
    for bundle in rest.tolist():
        lane = ranked.lanes[bundle]
        if lane not in closed and costs[bundle] <= left:
            added.append(bundle)
            left -= costs[bundle]
        else:
            closed.add(lane)
    return np.append(taken, np.array(added, dtype=np.int64))


def _divide_by_kind_mean(
    kinds: list[str], densities: list[NDArray[np.float64]], sizes: list[NDArray[np.int64]]
) -> None:
    """Divide densities by their mean over all units of the same kind, so that kinds compete on equal terms."""
    for kind in set(kinds):
        mine = [index for index, other in enumerate(kinds) if other == kind]
        of_kind = np.concatenate([densities[index] for index in mine])
        mean = np.average(of_kind, weights=np.concatenate([sizes[index] for index in mine]))
        if mean > 0.0:
            for index in mine:
                densities[index] /= mean
