"""Which events a run has: at some steps units go, at some ranks grow, at some both."""

from dataclasses import dataclass

from apt.apt_config import APTConfig
from apt.pruning.schedule import SparsityScheduler, TuningSchedule, to_steps


@dataclass(frozen=True)
class Timeline:
    """The events of a run, from both schedules.

    Args:
        pruning: sparsity, and the events at which units go.
        tuning: rank budget, and the events at which ranks grow; they may be the same or others.
        one_shot: whether all units go before step 1 instead, at an event of step 0.
    """

    pruning: SparsityScheduler
    tuning: TuningSchedule
    one_shot: bool = False

    @classmethod
    def of(cls, config: APTConfig, total_steps: int) -> "Timeline":
        """The timeline of a run of so many optimizer steps; a run too short for its events raises ValueError.

        Where the method does not prune there are no events, whatever the settings of pruning and tuning say.
        """
        if not config.prunes:
            return cls(SparsityScheduler(total_steps, 0.0, num_events=0), TuningSchedule(total_steps, num_events=0))
        pruning, tuning = config.pruning, config.tuning
        start = pruning.prune_start if tuning.tune_start is None else tuning.tune_start
        end = pruning.prune_end if tuning.tune_end is None else tuning.tune_end
        growths = pruning.events_in(total_steps) if tuning.num_tuning_events is None else tuning.num_tuning_events
        if tuning.growth_frequency is not None:
            window = to_steps(end, total_steps) - to_steps(start, total_steps)
            growths = max(1, window // tuning.growth_frequency)
        return cls(
            pruning.schedule(total_steps),
            TuningSchedule(total_steps, start, end, growths if config.grows else 0),
            pruning.prune_before_tuning and pruning.target_saving > 0.0,
        )

    @property
    def prune_steps(self) -> list[int]:
        """The optimizer step after which each event comes at which units go, ascending."""
        return [0] if self.one_shot else self.pruning.events

    @property
    def steps(self) -> list[int]:
        """The same of every event."""
        return sorted({*self.prune_steps, *self.tuning.events})

    def saving_at(self, step: int) -> float:
        """The fraction of parameters, or of the time of a forward pass, that the event of a step asks to be gone."""
        return self.pruning.target_sparsity if self.one_shot else self.pruning.get_current_sparsity(step)
