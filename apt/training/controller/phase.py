"""The moments of a run at which a part of it may have something to do."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from apt.records import Plan
from apt.training.controller.progress import Progress


class Phase:
    """A part of a run. The controller calls these in this order; by default each does nothing.

    A phase decides and follows; plans are carried out by the controller alone.
    """

    absent: ClassVar[Mapping[str, Any]] = {}  # what a checkpoint says of a run without such a phase

    def prepare(self) -> None:
        """Check and measure what must be known before the first step; called again it does nothing."""

    def change_loss(self, loss: Tensor, output: Any, batch: Mapping[str, Any] | None, step: int) -> Tensor:
        """The loss to differentiate in the place of the one so far, after `step` optimizer steps."""
        return loss

    def after_backward(self, progress: Progress, grad_scale: float, *, finite: bool) -> None:
        """Take in the statistics of the step in the making.

        Args:
            progress: how far the run is, that step not counted.
            grad_scale: the loss scaler's factor on the gradients.
            finite: whether the gradients are; a step where they are not is dropped.
        """

    def before_event(self, progress: Progress) -> None:
        """Get ready for the next event: called after every step, before the event that may be due."""

    def can_decide(self, event: int) -> bool:
        """Whether there is what a plan for the event of a step is made from; otherwise the event waits."""
        return True

    def decide(self, event: int) -> Plan | None:
        """The plan for the event of a step; None where this phase has no part in it."""
        return None

    @property
    def keeps_tail(self) -> bool:
        """Whether a cut must leave the dense weights behind the student's."""
        return False

    def settled(self, step: int) -> bool:
        """Whether no plan is to come after `step` optimizer steps but those of the timeline."""
        return True

    def follow(self, plan: Plan) -> None:
        """Bring what is kept beside the model to the shapes that it has after a plan was carried out."""

    def after_event(self, progress: Progress) -> None:
        """Forget what an event of the timeline has made stale."""

    def after_step(self, step: int) -> None:
        """Get ready for the next pass: called last, after `step` optimizer steps."""

    def leave(self) -> None:
        """Take back what stands on the model while the run goes on, which ends here; weights stay as they are."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs of this phase: the keys of `absent`, with JSON values and tensors."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any], progress: Progress) -> None:
        """Take up where the controller's `state` was made; the model must have the shapes of that moment already."""
