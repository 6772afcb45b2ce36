"""Where in a Trainer's loop the controller is called."""

from typing import Any

from transformers import TrainerCallback

from apt.training.checkpoint import RandomState


class Drive(TrainerCallback):
    """Calls the controller where the Trainer has its hooks.

    Args:
        trainer: an `APTrainer`.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.start_controller(state.max_steps)
        self.trainer._random = RandomState()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._clock.begin()
        self.trainer._took_gradients = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        if not trainer._took_gradients:
            raise ValueError(
                f"trainer: {type(trainer).__name__}.training_step does not call that of its base, so the scores of "
                f"this step are missing; call super().training_step(model, inputs, num_items_in_batch)"
            )
        trainer._clock.end(state.global_step)
        seen = len(trainer.controller.events)
        if trainer._recorder is not None:
            trainer._recorder.before_step(trainer.controller)
        trainer.controller.after_step()
        if len(trainer.controller.events) > seen:
            trainer._log_events(seen)
