"""What a set of units costs. Hidden dimensions multiply with heads and neurons, so no unit has a price of its own.

With d dimensions, and n units of a group that each take A parameters a dimension and B beside them::

    C = fixed + d * H + sum over groups of n * (A * d + B)

H is what a dimension takes for itself (norms, biases). C grows with every unit of any kind, so along a ranking it is
one running sum, and the longest prefix within a budget is found by one bisection.
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
    """The costs of a list of lanes: groups of units that keep the same count, one lane an entry of each array."""

    unit: Counts  # parameters of one unit of one group of the lane, at the present sizes
    present: Counts  # parameters of one more unit in every group of the lane, at the present dimensions; 0: hidden
    slope: Counts  # of these, for each dimension; 0 where no dimension is pruned
    hidden: NDArray[np.bool_]  # lanes of hidden dimensions: one or none
    own: int  # H
    dimensions: int  # at present; 0 where none are pruned

    @classmethod
    def of(cls, lanes: Sequence[Sequence[Group]]) -> "Prices":
        """The prices at the present sizes."""
        unit = np.array([lane[0].cost() for lane in lanes], dtype=np.int64)
        hidden = np.array([UNIT_KINDS[lane[0].kind].across_layers for lane in lanes])
        dims = [lane[0] for lane, across in zip(lanes, hidden, strict=True) if across]
        units = [[] if group_kind else lane for lane, group_kind in zip(lanes, hidden, strict=True)]
        present = np.array([sum(group.cost() for group in lane) for lane in units], dtype=np.int64)
        slope = np.array([sum(g.slope() for g in lane) if dims else 0 for lane in units], dtype=np.int64)
        shared = sum(g.slope() * g.num_units for lane in units for g in lane) if dims else 0
        own = dims[0].cost() - shared if dims else 0
        return cls(unit, present, slope, hidden, own, dims[0].num_units if dims else 0)

    def each(self, owners: Counts, counts: Counts, dimensions: int) -> Counts:
        """What each bundle of `counts` units of lane `owners` costs by itself, at so many dimensions."""
        return counts * (self.present - self.slope * (self.dimensions - dimensions))[owners]

    def spent(self, owners: Counts, counts: Counts) -> Counts:
        """Running cost of taking `counts` units of lane `owners`, one bundle after the other, from nothing."""
        taken = np.cumsum(np.where(self.hidden[owners], counts, 0))
        units = np.cumsum(counts * self.present[owners])
        gone = self.dimensions - taken
        return units - np.cumsum(counts * self.slope[owners]) * gone + taken * self.own

    def within(self, owners: Counts, counts: Counts, budget: float) -> Counts:
        """Positions of the bundles to take, of a ranking: the longest prefix that costs no more than the budget.

        Where a bundle of dimensions is what no longer fits, which can be dear, the rest goes on without dimensions.
        """
        end = int(np.searchsorted(self.spent(owners, counts), budget, side="right"))
        taken = np.arange(end)
        if end == len(owners) or not self.hidden[owners[end]]:
            return taken
        rest = end + np.flatnonzero(~self.hidden[owners[end:]])
        order = np.concatenate([taken, rest])
        return order[: int(np.searchsorted(self.spent(owners[order], counts[order]), budget, side="right"))]
