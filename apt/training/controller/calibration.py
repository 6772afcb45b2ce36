"""Static scores: sums over batches before any training, for a cut that needs no schedule."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from apt.layers.modes import modes_kept
from apt.process.progress import progress
from apt.pruning.salience import not_finite

Scores = dict[str, Tensor]
Loss = Callable[[nn.Module, Mapping[str, Any]], Tensor]


@dataclass(frozen=True)
class Calibration:
    """Training data for the events of a run that repair what they cut.

    Args:
        batches: for the step of an event, inputs and labels on the model's device; a resumed run asks for the same step
            again, and is the same run if it gets the same batches.
        compute_loss: from the model and a batch; by default the loss of the model itself.
    """

    batches: Callable[[int], Iterable[Mapping[str, Any]]]
    compute_loss: Loss | None = None

    def __post_init__(self) -> None:
        if not callable(self.batches):
            raise ValueError(
                f"calibration: batches is a function of an event's step, got a {type(self.batches).__name__}; give "
                f"apt.Calibration(lambda step: batches)"
            )


def model_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The loss that the model computes itself, from the labels in the batch."""
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"calibration: batches are mappings of tensors by name, as the model takes them; got a "
            f"{type(batch).__name__}"
        )
    loss = getattr(model(**batch), "loss", None)
    if not isinstance(loss, Tensor):
        raise ValueError("calibration: the model gave no loss; put labels into the batches, or give compute_loss")
    return loss


def static_scores(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    take_scores: Callable[[float], Scores],
    compute_loss: Loss = model_loss,
    grad_scale: float = 1.0,
    count: int | None = None,
    *,
    training: bool = True,
) -> Scores:
    """The plain sum over batches of the scores of each (method.md 7.3).

    Gradients are dropped, and the random state and the mode of every module stay as they were.

    Args:
        model: patched, its masks collecting.
        batches: inputs and labels, on the model's device.
        take_scores: called after each backward pass with the factor on its gradients; reads and empties the masks.
        compute_loss: from the model and a batch.
        grad_scale: factor on the loss, a power of 2; halved, for good, where a batch overflows with it, down to 1.
        count: of the batches, at most, where it is known.
        training: whether the passes drop what a step would drop.

    Raises:
        FloatingPointError: a loss or score is no number, whatever the factor.
        ValueError: there is no batch, or the loss depends on no unit.
    """
    total: Scores = {}
    devices = [p.device for p in model.parameters() if p.device.type == "cuda"][:1]
    with torch.random.fork_rng(devices=devices), torch.enable_grad(), modes_kept(model):
        model.train(training)
        for number, batch in enumerate(progress(batches, "calibration", total=count), 1):
            loss, scores = _one_batch(model, batch, take_scores, compute_loss, grad_scale)
            while (wrong := not_finite(scores)) and grad_scale > 1.0:
                grad_scale /= 2.0
                loss, scores = _one_batch(model, batch, take_scores, compute_loss, grad_scale)
            if wrong:
                raise FloatingPointError(
                    f"calibration: batch {number}, with a loss of {loss}, gives {wrong[0]} a salience that is NaN "
                    f"or infinite; look at that batch, or calibrate in a wider dtype"
                )
            total = {name: score + total.get(name, 0.0) for name, score in scores.items()}
    if not total:
        raise ValueError("calibration: there is no batch to score units on; give at least one")
    # A batch without a label has gradients of 0, and says nothing; all of them must not.
    if not any(bool(score.any()) for score in total.values()):
        raise ValueError("calibration: the loss depends on no unit, so none could be chosen; look at loss and labels")
    return total


def _one_batch(
    model: nn.Module,
    batch: Mapping[str, Any],
    take_scores: Callable[[float], Scores],
    compute_loss: Loss,
    grad_scale: float,
) -> tuple[float, Scores]:
    """The loss of a batch, and the scores it gives."""
    loss = compute_loss(model, batch)
    (loss * grad_scale).backward()
    model.zero_grad(set_to_none=True)
    return loss.item(), take_scores(grad_scale)


def output_entropy(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The mean entropy of what the model predicts, in nats: a measure of what matters to it that asks for no labels.

    As HFPrune (arXiv 2603.08083) scores units. The mean is over the tokens that are no padding, or over the examples.

    Raises:
        ValueError: the model does not predict one of several classes or tokens, or is to be told what its decoder
            reads.
    """
    generates = hasattr(model, "prepare_decoder_input_ids_from_labels")
    if generates and "decoder_input_ids" not in batch:
        raise ValueError("calibration: a decoder behind an encoder needs text to predict; put labels into the batches")
    logits = getattr(model(**{name: value for name, value in batch.items() if name != "labels"}), "logits", None)
    if not isinstance(logits, Tensor) or logits.shape[-1] < 2:
        raise ValueError(
            "calibration: this model predicts no classes or tokens, so its output has no entropy; put labels into the "
            "batches, or give compute_loss"
        )
    logits = logits.float()
    entropy = -(logits.log_softmax(-1) * logits.softmax(-1)).sum(-1)
    mask = batch.get("decoder_attention_mask" if generates else "attention_mask")
    if mask is None or mask.shape != entropy.shape:
        return entropy.mean()
    return (entropy * mask).sum() / mask.sum()
