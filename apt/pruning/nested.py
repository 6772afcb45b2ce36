"""Layers that hold units, as the search sees them: which stay in any case, what they are worth, who stands before whom.

A *lane* is what `apt.pruning.prices` says; that of a layer is the layer alone.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from apt.pruning.dimensions import Group
from apt.pruning.kinds import UNIT_KINDS
from apt.records import UnitName

Lanes = Sequence[Sequence[Group]]
Densities = Sequence[NDArray[np.float64]]


def is_layer(lane: Sequence[Group]) -> bool:
    """Whether a lane is a layer that may go."""
    return UNIT_KINDS[lane[0].kind].holds_units


def staying_layers(lanes: Lanes, worth: Mapping[str, float], least: int) -> set[str]:
    """Names of the layers that stay whatever comes: those that must, filled up with the best of each stack.

    Args:
        lanes: of the search.
        worth: of every layer, by its name.
        least: layers that every stack keeps.
    """
    stacks: dict[str, list[Group]] = {}
    for lane in lanes:
        if is_layer(lane):
            stacks.setdefault(UnitName.parse(lane[0].name).stack, []).append(lane[0])
    staying: set[str] = set()
    for groups in stacks.values():
        first = sorted(groups, key=lambda group: (-group.floor, -worth[_name(group)]))
        count = max(least, sum(group.floor for group in groups))
        staying |= {_name(group) for group in first[:count]}
    return staying


def least_units(lanes: Lanes, floors: Sequence[int], least: int) -> list[int]:
    """Units of each group of a lane in the smallest model that the floors let be; the dearest layers stay.

    Args:
        lanes: of the search.
        floors: units that stay where their layer does.
        least: as above.
    """
    prices = {_name(lane[0]): float(lane[0].whole_cost()) for lane in lanes if is_layer(lane)}
    gone = prices.keys() - staying_layers(lanes, prices, least)
    counts = zip(lanes, floors, strict=True)
    return [int(lane[0].holder not in gone) * max(floor, int(is_layer(lane))) for lane, floor in counts]


def scale_influence(lanes: Lanes, scores: Mapping[str, NDArray[np.float64]], densities: Densities) -> None:
    """Bring block influence to the scale of salience: over all layers it then sums to that of the units beside them."""
    influence = sum(scores[lane[0].name].sum() for lane in lanes if is_layer(lane))
    beside = [group for lane in lanes for group in lane if not is_layer(lane)]
    inside = [group for group in beside if group.holder is not None] or beside
    salience = sum(scores[group.name].sum() for group in inside)
    if not (influence > 0.0 and salience > 0.0):
        return
    for lane, density in zip(lanes, densities, strict=True):
        if is_layer(lane):
            density *= salience / influence


def order_of_bundles(lanes: Lanes, densities: Densities, least: int) -> NDArray[np.int64]:
    """The bundles of all lanes in their ranking, by falling density, none before the layer that holds it.

    A unit is ranked by the lower of its own density and that of its layer; those of one layer that are worth more than
    it by their own, and so before units of others that are worth as little.

    Args:
        lanes: of the search.
        densities: of each lane's bundles, infinite below its floor; those of layers that stay become so.
        least: layers that every stack keeps.
    """
    own = {_name(lane[0]): density for lane, density in zip(lanes, densities, strict=True) if is_layer(lane)}
    for name in staying_layers(lanes, {name: float(density[0]) for name, density in own.items()}, least):
        own[name][:] = np.inf
    limits = [own[lane[0].holder][0] if lane[0].holder in own else np.inf for lane in lanes]
    ranked = [np.minimum(density, limit) for density, limit in zip(densities, limits, strict=True)]
    inside = [np.full(len(density), not is_layer(lane)) for lane, density in zip(lanes, densities, strict=True)]
    keys = (np.concatenate(densities), np.concatenate(ranked))
    return np.lexsort((-keys[0], np.concatenate(inside), -keys[1]))


def _name(group: Group) -> str:
    assert group.holder is not None
    return group.holder
