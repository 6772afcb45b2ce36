"""What a run leaves behind: plans and events, one JSON line each. Plans are decisions; they can be replayed."""

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple


class UnitName(NamedTuple):
    """The name of a unit group inside layers, taken apart: ``"layers.3.heads"``, ``"decoder.3.cross_heads"``."""

    stack: str
    layer: int
    units: str

    @classmethod
    def parse(cls, name: str) -> "UnitName":
        """Take a name apart."""
        stack, layer, units = name.split(".")
        return cls(stack, int(layer), units)

    @property
    def part(self) -> str:
        """What such groups are called in every layer of the stack: ``"layers.heads"``, ``"decoder.cross_heads"``."""
        return f"{self.stack}.{self.units}"

    @property
    def title(self) -> str:
        """The same for a reader, without the stack where there is one alone: ``"heads"``, ``"decoder cross_heads"``."""
        return self.units if self.stack == "layers" else f"{self.stack} {self.units}"


@dataclass(frozen=True, kw_only=True)
class RepairNote:
    """What a repair did to the projection that reads the units of a group, before these were cut.

    Errors are the mean squared change of its output over that of the output itself, on calibration tokens held out.
    """

    ridge: float | None  # relative to the mean of the diagonal of the second moment; None: nothing helped
    before: float  # error of the cut alone
    after: float  # of the cut that is repaired
    # With repair "stream" the share of the drift behind the projection that it leaves; None: it was not corrected. One
    # that is corrected for what others have lost has no error of its own.
    stream: float | None = None

    @property
    def changed(self) -> bool:
        """Whether the projection got other weights."""
        return self.ridge is not None or self.stream is not None

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> "RepairNote":
        """The note of an entry. Raises TypeError where it is none."""
        note = cls(**row)
        for name in ("ridge", "before", "after", "stream"):
            value = getattr(note, name)
            if not (isinstance(value, int | float) or (name in ("ridge", "stream") and value is None)):
                raise TypeError(f"{name} of a repair is no number")
        return note


@dataclass(frozen=True, kw_only=True)
class PrunePlan:
    """Which units stay at an event.

    `kept` maps a unit group (``"layers.3.heads"``) to the ascending positions that stay, counted in the order the units
    have just before the event.
    """

    step: int  # optimizer steps done
    target_sparsity: float | None  # fraction of the block parameters that should be gone then; None: time is the goal
    kept: dict[str, list[int]]
    round_to: int  # neurons come in multiples of this
    # Of the projections whose frozen weights were changed, by unit group. A replay of the plan gives the shapes alone.
    repair: dict[str, RepairNote] | None = None

    @property
    def errors(self) -> dict[str, RepairNote]:
        """The notes of projections that lost units, and so have an error of their own."""
        return {name: note for name, note in (self.repair or {}).items() if note.before > 0.0}

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> "PrunePlan":
        row = dict(row)
        repair = row.get("repair")
        notes = None if repair is None else {name: RepairNote.from_json(note) for name, note in dict(repair).items()}
        return cls(**(row | {"repair": notes}))


@dataclass(frozen=True, kw_only=True)
class RankPlan:
    """The rank of every adapter that grows at an event; the others keep theirs."""

    step: int
    budget: int  # adapter parameters that may exist after this event
    ranks: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class TrimPlan:
    """The ranks that an adapter keeps for good: ascending positions by the adapter's name; none removes it."""

    step: int
    kept: dict[str, list[int]]


Plan = PrunePlan | RankPlan | TrimPlan


@dataclass(frozen=True, kw_only=True)
class Target:
    """What an event asks for: parameters gone, or a forward pass so many times as fast."""

    sparsity: float | None = None  # fraction of the block parameters
    speedup: float | None = None


@dataclass(frozen=True, kw_only=True)
class Event:
    """One pruning and tuning event, as it was carried out."""

    step: int
    prune: PrunePlan | None
    rank: RankPlan | None
    target_sparsity: float | None  # None: time is the goal
    sparsity: float  # reached, 1 - kept / total of the block parameters
    removed: float  # by this event, fraction of the original block parameters
    block_params: int  # left
    trainable_params: int
    seconds: float  # search and surgery
    target_speedup: float | None = None  # asked for by this event; None: parameters are the goal
    predicted_speedup: float | None = None  # of a forward pass after it, by the latency table
    trim: TrimPlan | None = None

    @property
    def plans(self) -> list[Plan]:
        """The plans of the event, in the order in which they were carried out."""
        return [plan for plan in (self.prune, self.rank, self.trim) if plan is not None]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> "Event":
        """The event of a line. Raises KeyError, TypeError or ValueError where it is none."""
        _check_numbers(row)
        prune, rank, trim = row["prune"], row["rank"], row.get("trim")
        plans = {
            "prune": prune and PrunePlan.from_json(prune),
            "rank": rank and RankPlan(**rank),
            "trim": trim and TrimPlan(**trim),
        }
        for plan in (prune, trim):
            for name, kept in dict(plan["kept"]).items() if plan else ():
                if not (isinstance(kept, list) and all(type(position) is int for position in kept)):
                    raise TypeError(f"what stays of {name!r} is no list of positions")
        for name, value in dict(rank["ranks"]).items() if rank else ():
            if type(value) is not int:
                raise TypeError(f"the rank of {name!r} is no whole number")
        return cls(**{**row, **plans})


def _check_numbers(row: dict[str, Any]) -> None:
    """Raise KeyError or TypeError where an entry of a line that is a number in every event is none."""
    for name in ("step", "sparsity", "removed", "block_params", "trainable_params", "seconds"):
        if not isinstance(row[name], int | float):
            raise TypeError(f"{name} is no number")
    for name in ("target_sparsity", "target_speedup", "predicted_speedup"):
        if not isinstance(row.get(name), int | float | None):
            raise TypeError(f"{name} is no number")
