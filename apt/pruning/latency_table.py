"""What units cost in time: a table measured on one device, and the prices that a search takes from it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

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
        stack, _, kind = name.split(".")
        points = self.parts.get(f"{stack}.{kind}")
        if points is None:
            raise ValueError(f"latency: the table has no {stack}.{kind}; it is another model's, so measure anew")
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
    """The milliseconds of a list of lanes: groups of units that keep the same count, one lane an entry."""

    hidden: NDArray[np.bool_]  # lanes of hidden dimensions: none, they are not priced by time
    dimensions: int  # 0, likewise
    curves: tuple[Times, ...]  # of each lane: ms of 0, 1, ... units in each of its groups, all groups together
    widths: tuple[int, ...]  # groups of each lane

    @classmethod
    def of(cls, lanes: Sequence[Sequence[Countable]], table: LatencyTable) -> "TimePrices":
        """The prices of the present units."""
        curves = [sum(table.part_ms(g.name, np.arange(g.num_units + 1)) for g in lane) for lane in lanes]
        none = np.zeros(len(lanes), dtype=np.bool_)
        return cls(none, 0, tuple(np.asarray(curve) for curve in curves), tuple(map(len, lanes)))

    @cached_property
    def unit(self) -> Times:
        """Mean price of one unit of one group of each lane."""
        means = [
            (curve[-1] - curve[0]) / max(1, len(curve) - 1) / width
            for curve, width in zip(self.curves, self.widths, strict=True)
        ]
        return np.maximum(means, LEAST_MS)

    def each(self, owners: Counts, counts: Counts, dimensions: int = 0) -> Times:
        """What each bundle of `counts` units of lane `owners` adds to those of its lane that stand before it."""
        added = np.zeros(len(owners))
        for lane, curve in enumerate(self.curves):
            mine = np.flatnonzero(owners == lane)
            added[mine] = np.diff(curve[np.concatenate([[0], np.cumsum(counts[mine])])])
        return added

    def spent(self, owners: Counts, counts: Counts) -> Times:
        """Running cost of taking these bundles one after the other, from none in any lane."""
        return sum(float(curve[0]) for curve in self.curves) + np.cumsum(self.each(owners, counts))

    def within(self, owners: Counts, counts: Counts, budget: float) -> Counts:
        """Positions of the bundles to take, of a ranking: the longest prefix that costs no more than the budget."""
        spent = self.spent(owners, counts)
        allowed = budget + ROUNDING * (spent[-1] if len(spent) else 0.0)
        return np.arange(int(np.searchsorted(spent, allowed, side="right")))
