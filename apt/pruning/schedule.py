"""Schedules as pure functions of numbers: the steps of the events, sparsity, rank budget, decay of the masks."""

from dataclasses import dataclass

import numpy as np

SCHEDULES = ("cubic",)
Point = float | int  # a float is a fraction of the run (or of an interval), an int is an absolute number of steps


def check_point(room: str, name: str, point: Point) -> None:
    """Raise ValueError for a setting that is no point of a run."""
    if point < 0 or (isinstance(point, float) and point > 1.0):
        raise ValueError(f"{room}: {name} must be a fraction in [0, 1] or a number of steps, got {point}")


def to_steps(point: Point, length: int) -> int:
    """A point of the schedule in steps: an int as it is, a float as that fraction of `length`, rounded down."""
    return point if isinstance(point, int) else int(point * length)


def event_steps(start: int, end: int, num_events: int) -> list[int]:
    """``int(linspace(start, end, N + 1))[k]``, k = 1..N: the optimizer steps after which N events come, ascending."""
    return [int(step) for step in np.linspace(start, end, num_events + 1)[1:]]


def loss_weight(step: int, begins: int, ends: int, first: float, last: float) -> float:
    """mu of the distillation loss at a step: linear from `first` at `begins` to `last` at `ends`, constant outside."""
    progress = (step - begins) / (ends - begins) if ends > begins else 1.0
    return first + (last - first) * min(1.0, max(0.0, progress))


@dataclass(frozen=True)
class SparsityScheduler:
    """Cubic sparsity over a window of the run, reached in a few events (APT, `param_control.py`; method.md 4.1).

    Event k of N, k = 1..N, comes after step ``int(linspace(start, end, N + 1))[k]``. Its sparsity is
    ``target * (1 - (1 - (t - t_w) / (end - t_w))^3)`` with ``t_w = start + sparsity_warmup``, and 0 before t_w.

    Args:
        total_steps: optimizer steps of the run.
        target_sparsity: fraction in [0, 1).
        schedule_type: ``"cubic"``.
        prune_start, prune_end, sparsity_warmup: points of the run.
        num_events: N.
        decay, settle: how long masks fall, and how long they then rest at exactly 0 or 1, before each event: ints are
            steps, floats fractions of the interval since the event before.

    Raises:
        ValueError: unknown type, or the run is too short for N distinct events.
    """

    total_steps: int
    target_sparsity: float
    schedule_type: str = "cubic"
    prune_start: Point = 0.02
    prune_end: Point = 0.40
    sparsity_warmup: Point = 0.0
    num_events: int = 5
    decay: Point = 0.6
    settle: Point = 0.2

    def __post_init__(self) -> None:
        if self.schedule_type not in SCHEDULES:
            raise ValueError(f"schedule: schedule_type must be 'cubic', got {self.schedule_type!r}")
        start = to_steps(self.prune_start, self.total_steps)
        steps = self.events
        if not 0.0 <= self.target_sparsity < 1.0:
            raise ValueError(f"schedule: target_sparsity must be in [0, 1), got {self.target_sparsity}")
        if sorted(set(steps)) != steps or (steps and steps[0] <= start) or (steps and steps[-1] > self.total_steps):
            raise ValueError(
                f"schedule: a run of {self.total_steps} steps is too short for {self.num_events} events between step "
                f"{start} and step {self.end}; train for more steps (20 or more suit the defaults) or lower num_events"
            )

    @property
    def start(self) -> int:
        """The optimizer step at which the window opens."""
        return to_steps(self.prune_start, self.total_steps)

    @property
    def end(self) -> int:
        """The optimizer step of the last event."""
        return to_steps(self.prune_end, self.total_steps)

    @property
    def events(self) -> list[int]:
        """The optimizer step after which each event comes, ascending."""
        return event_steps(self.start, self.end, self.num_events)

    def get_current_sparsity(self, step: int) -> float:
        """The sparsity asked for at a step: 0 before the window, the target after it, cubic between."""
        warm = self.start + to_steps(self.sparsity_warmup, self.total_steps)
        if step >= self.end:
            return self.target_sparsity
        if step < warm:
            return 0.0
        left = (self.end - step) / (self.end - warm)
        return self.target_sparsity * (1.0 - left**3)

    def windows(self, index: int) -> tuple[int, int]:
        """Steps ``(decay begins, settled)`` of event `index` (0-based): masks fall between, rest after.

        Where the decay lasts less than one step, both are the step of the event: a hard switch.
        """
        before = self.events[index - 1] if index else self.start
        event = self.events[index]
        settle, decay = to_steps(self.settle, event - before), to_steps(self.decay, event - before)
        settled = max(before, event - settle)
        begins = max(before, settled - decay)
        return (begins, settled) if settled > begins else (event, event)


@dataclass(frozen=True)
class TuningSchedule:
    """Says when ranks grow, and up to which budget: linear over a window of its own (method.md 5.2).

    Args:
        total_steps: optimizer steps of the run.
        tune_start, tune_end: points of the run; the budget is full at tune_end.
        num_events: growths, spaced like the events of `SparsityScheduler`.

    Raises:
        ValueError: the run is too short for so many distinct events.
    """

    total_steps: int
    tune_start: Point = 0.02
    tune_end: Point = 0.40
    num_events: int = 5

    def __post_init__(self) -> None:
        steps = self.events
        if sorted(set(steps)) != steps or (steps and (steps[0] <= self.start or steps[-1] > self.total_steps)):
            raise ValueError(
                f"tuning: a run of {self.total_steps} steps is too short for ranks to grow {self.num_events} times "
                f"between step {self.start} and step {self.end}; train for more steps or lower num_tuning_events"
            )

    @property
    def start(self) -> int:
        return to_steps(self.tune_start, self.total_steps)

    @property
    def end(self) -> int:
        return to_steps(self.tune_end, self.total_steps)

    @property
    def events(self) -> list[int]:
        """The optimizer step after which each growth comes, ascending."""
        return event_steps(self.start, self.end, self.num_events)

    def budget_ratio(self, step: int, final: float) -> float:
        """Adapter parameters over those at the start: linear from 1 at tune_start to `final` at tune_end."""
        progress = (step - self.start) / (self.end - self.start)
        return 1.0 + (final - 1.0) * min(1.0, max(0.0, progress))
