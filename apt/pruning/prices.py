"""What a set of units costs. Hidden dimensions multiply with heads and neurons, so no unit has a price of its own.

A *lane* is the groups of units that keep one common count: a group alone, or in a uniform layout all of a kind. A
*bundle* is units of one lane that stay or go together. Lanes are numbered, and a list of bundles is two arrays: the
lane of each and its size, the units that it has in each group of that lane.

With d dimensions, and n units of a group that each take A parameters a dimension and B beside them::

    C = fixed + d * H + sum over groups of n * (A * d + B)

H is what a dimension takes for itself (norms, biases). C grows with every unit of any kind, so along a ranking it is
one running sum, and the longest prefix within a budget is found by one bisection. A layer that may go is a unit whose
own A and B are what no other unit takes of it (norms, biases); it stands before its units in every ranking.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from apt.pruning.dimensions import Group
from apt.pruning.kinds import UNIT_KINDS

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Prices:
    """The costs of a list of lanes in parameters, one lane an entry of each array."""

    # What goes with one unit of one group of the lane, the units inside it too, at the present sizes.
    price_per_unit: Counts
    # One more unit in every group of the lane, at the present dimensions; 0 in a lane of hidden dimensions.
    price_in_all_groups: Counts
    # How much of it goes with each hidden dimension; 0 where none is pruned.
    slope_per_dimension: Counts
    # Which lanes are of hidden dimensions: one or none.
    hidden: NDArray[np.bool_]
    # H
    price_per_dimension: int
    # Hidden dimensions at present; 0 where none are pruned.
    dimensions: int

    @classmethod
    def of(cls, lanes: Sequence[Sequence[Group]]) -> "Prices":
        """The prices at the present sizes."""
        hidden = [UNIT_KINDS[lane[0].kind].across_layers for lane in lanes]
        dimensions = next((lane[0] for lane, across in zip(lanes, hidden, strict=True) if across), None)
        # The groups that multiply with the dimensions.
        in_layers = [[] if across else lane for lane, across in zip(lanes, hidden, strict=True)]
        slopes = [0] * len(lanes)
        price_per_dimension = 0
        if dimensions is not None:
            slopes = [sum(group.slope() for group in lane) for lane in in_layers]
            shared = sum(group.slope() * group.num_units for lane in in_layers for group in lane)
            price_per_dimension = dimensions.cost() - shared
        return cls(
            price_per_unit=np.array([lane[0].whole_cost() for lane in lanes], dtype=np.int64),
            price_in_all_groups=np.array([sum(group.cost() for group in lane) for lane in in_layers], dtype=np.int64),
            slope_per_dimension=np.array(slopes, dtype=np.int64),
            hidden=np.array(hidden),
            price_per_dimension=price_per_dimension,
            dimensions=0 if dimensions is None else dimensions.num_units,
        )

    def cost_of_each(self, lanes: Counts, sizes: Counts, dimensions: int) -> Counts:
        """What each bundle costs by itself, at so many dimensions."""
        prices = self.price_in_all_groups - self.slope_per_dimension * (self.dimensions - dimensions)
        return sizes * prices[lanes]

    def running_cost(self, lanes: Counts, sizes: Counts) -> Counts:
        """Cost of the first bundle, of the first two, of the first three, and so on."""
        taken = np.cumsum(np.where(self.hidden[lanes], sizes, 0))
        gone = self.dimensions - taken
        at_present = np.cumsum(sizes * self.price_in_all_groups[lanes])
        saved = np.cumsum(sizes * self.slope_per_dimension[lanes]) * gone
        return at_present - saved + taken * self.price_per_dimension

    def longest_affordable_prefix(self, lanes: Counts, sizes: Counts, budget: float) -> Counts:
        """Positions of the bundles to take from a ranking: the longest prefix that costs no more than the budget.

        Where a bundle of dimensions is what no longer fits, which can be dear, the rest goes on without dimensions.
        """
        end = int(np.searchsorted(self.running_cost(lanes, sizes), budget, side="right"))
        prefix = np.arange(end)
        if end == len(lanes) or not self.hidden[lanes[end]]:
            return prefix
        rest = end + np.flatnonzero(~self.hidden[lanes[end:]])
        order = np.concatenate([prefix, rest])
        cost = self.running_cost(lanes[order], sizes[order])
        return order[: int(np.searchsorted(cost, budget, side="right"))]
