"""What must be a number before the optimizer moves a parameter; errors say of which step the parameters still are."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from apt.pruning.salience import not_finite


def task_loss(output: Any, step: int) -> Tensor:
    """The loss in what a model returned: an output with ``.loss``, a mapping with ``"loss"``, or the loss itself.

    Raises:
        FloatingPointError: it is NaN or infinite.
    """
    loss: Tensor
    if isinstance(output, Tensor):
        loss = output
    elif isinstance(output, Mapping):
        loss = output["loss"]
    else:
        loss = output.loss
    if not torch.isfinite(loss.detach()).all():
        raise FloatingPointError(
            f"controller: the loss is {loss.detach().mean().item()} at step {step + 1}; the parameters are still those "
            f"of step {step}; lower the learning rate or check the data"
        )
    return loss


def gradients_are_finite(model: nn.Module, step: int, scaled: bool) -> bool:
    """Whether every gradient is finite; asks the device once.

    Raises:
        FloatingPointError: one is not, and no scaler will drop the step.
    """
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    norms = torch._foreach_norm(grads) if grads else []
    finite = bool(torch.isfinite(torch.stack([norm.float() for norm in norms])).all()) if norms else True
    if not finite and not scaled:
        raise FloatingPointError(
            f"controller: a gradient is NaN or infinite at step {step + 1}; the parameters are still those of step "
            f"{step}; lower the learning rate or check the data"
        )
    return finite


def check_scores(scores: dict[str, Tensor], step: int) -> None:
    """Raise FloatingPointError where the salience of a unit is NaN or infinite."""
    for name in not_finite(scores):
        raise FloatingPointError(
            f"controller: the salience of {name} is NaN or infinite at step {step + 1}, so no event could choose among "
            f"its units; look at that layer's activations, or train in a wider dtype"
        )
