"""What a run adds to a trainer's loss, put around it whoever computes it.

A `Trainer` is made to have its `compute_loss` overridden: classes are weighed there, and every trainer of TRL has one
of its own. So what a run adds cannot stand inside that method. It stands around it, and learns what the model was given
and what it answered from the pass itself.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from apt.layers import APTAdapter
from apt.layers.passes import labels_known
from apt.surgery import bare_model, uncompiled
from apt.training.controller import Controller
from apt.training.controller.verify import FUSED_HEAD


@dataclass
class SeenPass:
    """The latest pass with gradients while a loss was computed."""

    batch: dict[str, Any] = field(default_factory=dict)  # what the model was given, by name; empty where none was seen
    output: Any = None
    fused_head: bool = False  # whether the logits were to be left out

    def named(self, loss: Tensor) -> Any:
        """The output with this loss in it, or the loss alone."""
        return {**self.output, "loss": loss} if isinstance(self.output, Mapping) else loss


def labels_of(inputs: Any) -> Any:
    """The labels of a batch, None where it has none."""
    return inputs.get("labels") if isinstance(inputs, Mapping) else None


def knowing_labels(model: nn.Module, inputs: Any) -> AbstractContextManager[None]:
    """Let the passes inside know the labels of a batch: a smoothed loss, or one of the user's, takes them out first."""
    return labels_known(bare_model(model), labels_of(inputs))


@contextmanager
def loss_with(trainer: Any, add: Callable[[Tensor, SeenPass], Tensor]) -> Iterator[None]:
    """While inside, ``trainer.compute_loss`` returns what `add` makes of its loss.

    It stands on the object, so it comes around the method of any class, and around one that a user has put there.

    Args:
        trainer: a `transformers.Trainer`.
        add: from the loss of a micro-batch and the pass it comes from to the loss that is differentiated.
    """
    own = vars(trainer).get("compute_loss")
    plain = trainer.compute_loss

    @functools.wraps(plain)
    def compute_loss(model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        with _watched(model, labels_of(inputs)) as seen, knowing_labels(model, inputs):
            found = plain(model, inputs, *args, **kwargs)
        if isinstance(found, tuple):
            return (add(found[0], seen), *found[1:])
        return add(found, seen)

    trainer.compute_loss = compute_loss
    try:
        yield
    finally:
        if own is None:
            del trainer.compute_loss
        else:
            trainer.compute_loss = own


@contextmanager
def _watched(model: nn.Module, labels: Any) -> Iterator[SeenPass]:
    """What the model's latest pass with gradients inside was; `labels` go with it where it was given none."""
    seen = SeenPass()
    if bare_model(model) is not uncompiled(model):  # what is called is given no batch of the patched model's
        yield seen
        return

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not torch.is_grad_enabled():
            return
        names = list(inspect.signature(model.forward).parameters) if args else []
        seen.batch = {**dict(zip(names, args, strict=False)), **kwargs}
        seen.fused_head = bool(seen.batch.pop(FUSED_HEAD, False))
        if labels is not None:
            seen.batch.setdefault("labels", labels)
        seen.output = output

    # On what the trainer calls: a compiled model is called through a wrapper, whose hooks no graph holds.
    hook = model.register_forward_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


def loss_is_scaled(trainer: Any) -> bool:
    """Whether a trainer's loss of a micro-batch is divided by what the whole step has, as it says itself."""
    said = getattr(trainer, "loss_is_scaled_for_ga", None)
    return trainer.compute_loss_func is not None if said is None else bool(said)


class StepLoss:
    """The parts of an optimizer step's loss, one for each of its micro-batches.

    Args:
        trainer: an `APTrainer`, whose controller adds to the loss.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.weights: list[float] = []  # of the micro-batches of this step that are still to come

    def whole(self, loss: Tensor, seen: SeenPass) -> Tensor:
        """The trainer's own loss of the next micro-batch and what the controller adds to its mean, weighed.

        Raises:
            ValueError: the trainer passes by what stands in the model, or by what a teacher is compared on.
            FloatingPointError: the loss is NaN or infinite.
        """
        controller: Controller = self.trainer.controller
        scaled = loss_is_scaled(self.trainer)
        weight = self.weights.pop(0) if self.weights else 1.0
        if not weight:  # no label counts, so that a mean over them is no number
            return loss if scaled else torch.zeros_like(loss).requires_grad_()
        share = weight
        if scaled:
            share = weight / self.trainer.current_gradient_accumulation_steps
            loss = loss / share
        self._check_pass(controller, seen)
        seen = self._with_predictions(controller, seen)
        return controller.loss(seen.named(loss), seen.batch or None) * share

    def _check_pass(self, controller: Controller, seen: SeenPass) -> None:
        kind = type(self.trainer).__name__
        output = getattr(controller.model, "get_output_embeddings", lambda: None)()
        narrows = any(kind.across_layers for kind in controller.config.pruning.kinds)
        if seen.fused_head and isinstance(output, APTAdapter) and (output.rank or narrows):
            raise ValueError(
                f"trainer: {kind} multiplies by the weight of the output layer itself, past the mask or the adapter "
                f"there; prune heads and neurons alone, and leave that layer out of target_modules"
            )
        if controller.distillation is not None and not controller.distillation.over and not seen.batch:
            raise ValueError(
                f"trainer: a teacher is compared on what the model answers to a batch, and {kind} does not call the "
                f"model as a whole; set use_self_distillation to false"
            )

    def _with_predictions(self, controller: Controller, seen: SeenPass) -> SeenPass:
        """The pass; one more where it left out the predictions that a teacher is compared on."""
        distillation = controller.distillation
        if not seen.fused_head or distillation is None or not distillation.teaches(controller.step):
            return seen
        inputs = {name: value for name, value in seen.batch.items() if name != "labels"}
        return replace(seen, output=self.trainer.model(**inputs))
