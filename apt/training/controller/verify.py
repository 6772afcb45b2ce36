"""Whether an event left the function of the model as it was."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from apt.layers.around import Call, arguments, around_of, by_name, wrap
from apt.layers.modes import evaluating
from apt.process.per_thread import PerThread
from apt.surgery import patch_state

ALLOWED = {torch.float64: 1e-9, torch.float32: 1e-4}  # relative to the largest logit
ALLOWED_HIDDEN = 1e-5  # in float64 too, see `compare`
ALLOWED_NARROW = 5e-2  # in 16 bits
ANSWERS = (("logits",), ("start_logits", "end_logits"), ("last_hidden_state",))  # what is compared, the first there is
# TRL's: a pass that is given it returns no logits, but what its own product with the output layer makes of them.
FUSED_HEAD = "fused_lm_head"


class _Latest(PerThread):
    def __init__(self) -> None:
        self.batch: dict[str, Any] | None = None  # what the latest pass that learns was given, by name


class _Keep:
    """Around the whole model, whoever calls it: a trainer may hand on less than the model is given, or call a part."""

    def __init__(self, names: list[str], latest: _Latest) -> None:
        self.names = names
        self.latest = latest

    def __call__(self, call: Call, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            given = by_name(self.names, args, kwargs)
            given.pop(FUSED_HEAD, None)
            if given.get("past_key_values") is None:  # a pass behind a cache cannot be repeated
                self.latest.batch = {
                    name: value.detach() if isinstance(value, Tensor) else value for name, value in given.items()
                }
        return call(*args, **kwargs)


class LogitCheck:
    """Compares the logits on one batch before and after an event; of a model without a head its last hidden state.

    Args:
        model: whose events are checked; patched.
        on: False makes every call do nothing.
    """

    def __init__(self, model: nn.Module, on: bool) -> None:
        self.model, self.on = model, on
        self._latest = _Latest()
        around = around_of(model)
        if around is not None:  # of an earlier run of the model
            around.wrappers = [wrapper for wrapper in around.wrappers if not isinstance(wrapper, _Keep)]
        if on:
            patch_state(model).hooks.append(wrap(model, _Keep(arguments(model), self._latest), outside=True))

    @torch.no_grad()
    def logits(self) -> Tensor | None:
        """The model's logits on the latest batch, in evaluation mode; None where there is nothing to check.

        Raises:
            ValueError: the model answers nothing that can be compared.
        """
        batch = self._latest.batch
        if not self.on or batch is None:
            return None
        with evaluating(self.model):
            output = self.model(**batch)
        found = output if isinstance(output, Mapping) else {}
        names = next((names for names in ANSWERS if all(name in found for name in names)), None)
        if names is None:
            raise ValueError(
                f"controller: verify_events compares logits or the last hidden state, and {type(self.model).__name__} "
                f"answers neither; set it to false"
            )
        return torch.cat([found[name] for name in names])

    def compare(self, step: int, before: Tensor | None, *, hidden: bool = False) -> None:
        """Raise RuntimeError where a logit is not what it was before the event of that step.

        With `hidden`, masks on hidden dimensions stood before it: norms that weigh by them keep float64, where those of
        transformers round to float32.
        """
        if self.on and before is None and step > 0:
            warnings.warn(
                f"controller: verify_events saw no pass of the whole model before the event of step {step}, so that "
                f"event is not checked; call the model itself, not a part of it",
                stacklevel=2,
            )
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
