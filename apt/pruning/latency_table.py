"""What units cost in time: a table measured on one device, and the prices that a search takes from it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from apt.records import UnitName

Counts = NDArray[np.int64]
Times = NDArray[np.float64]
ROUNDING = 1e-9  # of a sum of times, relative
LEAST_MS = 1e-9  # of a unit: what takes no measurable time is still ranked by its score


class Countable(Protocol):
    """What prices ask of a unit group."""

    @property
    def name(self) -> str: ...
    @property
    def num_units(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class LatencyTable:
    """Milliseconds of a forward pass of one model on one device, part by part.

    A part is the attention or the FFN of one layer. Its time goes in straight lines between the measured points and
    never falls where units are added: of two measurements that say otherwise the smaller width counts.

    Raises:
        ValueError: a part has no two points that begin at 0 units, or a time is negative or no number.
    """

    device: str  # what it was measured on
    batch_size: int
    length: int  # tokens
    dense_ms: float  # the model that was measured
    rest_ms: float  # all of it that no unit takes: embeddings, norms, head, residual streams
    parts: dict[str, list[list[float]]]  # "layers.heads" -> [[units, ms], ...], ascending from 0 units, of one layer

    def __post_init__(self) -> None:
        for part, points in self.parts.items():
            table = np.asarray(points, dtype=np.float64)
            good = table.ndim == 2 and table.shape[1:] == (2,) and len(table) > 1 and table[0, 0] == 0
            if not good or not np.isfinite(table).all() or (np.diff(table[:, 0]) <= 0).any() or (table < 0).any():
                raise ValueError(
                    f"latency: the points of {part!r} must be pairs of units and ms, ascending from 0 units, none "
                    f"negative; got {points}"
                )
        if not 0.0 <= self.rest_ms <= self.dense_ms < float("inf"):
            raise ValueError(
                f"latency: rest_ms must be at least 0 and at most dense_ms, got {self.rest_ms} and {self.dense_ms}"
            )

    def part_ms(self, name: str, units: int | Counts) -> Times:
        """Time of the part that a unit group belongs to, with so many of its units.

        Raises:
            ValueError: the part was not measured, or not at so many units.
        """
        part = UnitName.parse(name).part
        points = self.parts.get(part)
        if points is None:
            raise ValueError(f"latency: the table has no {part}; it is another model's, so measure anew")
        widths, ms = np.asarray(points, dtype=np.float64).T
        if np.max(units, initial=0) > widths[-1]:
            raise ValueError(
                f"latency: {name} has {int(np.max(units))} units, the table ends at {int(widths[-1])}; it is another "
                f"model's, so measure anew"
            )
        return np.asarray(np.interp(units, widths, np.maximum.accumulate(ms)))

    def total_ms(self, counts: Mapping[str, int]) -> float:
        """Time of a forward pass of the model with so many units in each unit group."""
        return self.rest_ms + sum(float(self.part_ms(name, units)) for name, units in counts.items())

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> "LatencyTable":
        return cls(**row)


@dataclass(frozen=True)
class TimePrices:
    """The costs of a list of lanes in milliseconds, one lane an entry. `apt.pruning.prices` says what a lane is."""

    # Lanes of hidden dimensions: none, they are not priced by time.
    hidden: NDArray[np.bool_]
    # Likewise 0.
    dimensions: int
    # For each lane: ms of 0, 1, ... units in each of its groups, all groups together.
    curves: tuple[Times, ...]
    # Groups of each lane.
    widths: tuple[int, ...]

    @classmethod
    def of(cls, lanes: Sequence[Sequence[Countable]], table: LatencyTable) -> "TimePrices":
        """The prices of the present units."""
        curves = [sum(table.part_ms(group.name, np.arange(group.num_units + 1)) for group in lane) for lane in lanes]
        return cls(
            hidden=np.zeros(len(lanes), dtype=np.bool_),
            dimensions=0,
            curves=tuple(np.asarray(curve) for curve in curves),
            widths=tuple(len(lane) for lane in lanes),
        )

    @cached_property
    def price_per_unit(self) -> Times:
        """Mean price of one unit of one group of each lane."""
        means = []
        for curve, width in zip(self.curves, self.widths, strict=True):
            num_units = max(1, len(curve) - 1)
            means.append((curve[-1] - curve[0]) / num_units / width)
        return np.maximum(means, LEAST_MS)

    def cost_of_each(self, lanes: Counts, sizes: Counts, dimensions: int = 0) -> Times:
        """What each bundle adds to those of its lane that stand before it."""
        added = np.zeros(len(lanes))
        for lane, curve in enumerate(self.curves):
            mine = np.flatnonzero(lanes == lane)
            counts = np.concatenate([[0], np.cumsum(sizes[mine])])
            added[mine] = np.diff(curve[counts])
        return added

    def running_cost(self, lanes: Counts, sizes: Counts) -> Times:
        """Cost of the first bundle, of the first two, and so on, beside what lanes without any unit take."""
        without_units = sum(float(curve[0]) for curve in self.curves)
        return without_units + np.cumsum(self.cost_of_each(lanes, sizes))

    def longest_affordable_prefix(self, lanes: Counts, sizes: Counts, budget: float) -> Counts:
        """Positions of the bundles to take from a ranking: the longest prefix that costs no more than the budget."""
        cost = self.running_cost(lanes, sizes)
        rounding = ROUNDING * (cost[-1] if len(cost) else 0.0)
        return np.arange(int(np.searchsorted(cost, budget + rounding, side="right")))
