"""How far a run is: steps and events done, and which event of its timeline comes next."""

from dataclasses import dataclass, field

from apt.records import Event
from apt.training.controller.timeline import Timeline


@dataclass
class Progress:
    """How far a run is on its timeline."""

    timeline: Timeline
    step: int = 0  # optimizer steps done
    events: list[Event] = field(default_factory=list)  # done

    @property
    def num_scheduled(self) -> int:
        """Events done of those that have a step of their own in the timeline."""
        return sum(event.trim is None for event in self.events)

    @property
    def num_pruned(self) -> int:
        """Events done at which units went."""
        return sum(event.prune is not None for event in self.events)

    @property
    def active(self) -> bool:
        """Whether an event of the timeline is still to come."""
        return self.num_scheduled < len(self.timeline.steps)

    @property
    def still_prunes(self) -> bool:
        """Whether units are still to go."""
        return self.num_pruned < len(self.timeline.prune_steps)

    @property
    def next_event(self) -> int:
        """The step of the next event of the timeline, while the run is `active`."""
        return self.timeline.steps[self.num_scheduled]

    @property
    def awaits_calibration(self) -> bool:
        """Whether all units are to go before the first step, and have not yet."""
        return self.timeline.one_shot and not self.events and not self.step
