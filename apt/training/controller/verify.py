"""Whether an event left the function of the model as it was."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from apt.layers.modes import evaluating

ALLOWED = {torch.float64: 1e-9, torch.float32: 1e-4}  # relative to the largest logit
ALLOWED_HIDDEN = 1e-5  # in float64 too, see `compare`
ALLOWED_NARROW = 5e-2  # in 16 bits


class LogitCheck:
    """Compares the logits on one batch before and after an event.

    Args:
        model: whose events are checked.
        on: False makes every call do nothing.
    """

    def __init__(self, model: nn.Module, on: bool) -> None:
        self.model, self.on = model, on
        self._batch: dict[str, Any] | None = None

    def keep(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """Remember the latest batch, inputs of the model by name; returns it."""
        if self.on:
            self._batch = dict(batch)
        return batch

    @torch.no_grad()
    def logits(self) -> Tensor | None:
        """The model's logits on the latest batch, in evaluation mode; None where there is nothing to check."""
        if not self.on or self._batch is None:
            return None
        with evaluating(self.model):
            output = self.model(**self._batch)
        logits = output["logits"] if "logits" in output else torch.cat([output["start_logits"], output["end_logits"]])
        assert isinstance(logits, Tensor)
        return logits

    def compare(self, step: int, before: Tensor | None, *, hidden: bool = False) -> None:
        """Raise RuntimeError where a logit is not what it was before the event of that step.

        With `hidden`, masks on hidden dimensions stood before it: norms that weigh by them keep float64, where those of
        transformers round to float32.
        """
        after = self.logits()
        if before is None or after is None:
            return
        moved = float((after - before).abs().max())
        allowed = ALLOWED.get(after.dtype, ALLOWED_NARROW)
        allowed = max(allowed, ALLOWED_HIDDEN if hidden else 0.0) * max(1.0, float(before.abs().max()))
        if not moved <= allowed:
            raise RuntimeError(
                f"controller: the event of step {step} moved a logit by {moved:.2e} (at most {allowed:.0e})"
            )
