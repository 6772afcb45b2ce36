"""A training loop of one's own around a patched model, as a user without a Trainer writes it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny_models import tiny_batch, tiny_model

import apt

BRIEF = {"num_events": 3, "round_to": 4, "prune_end": 0.6}
ONCE = {"num_events": 1, "prune_start": 0, "prune_end": 20, "decay": 5, "settle": 5, "round_to": 1}  # falls in 10-15


class Loop:
    """A training loop of one's own around a patched model."""

    def __init__(
        self,
        name: str,
        model: Any,
        total_steps: int = 30,
        loss_scale: float = 1.0,
        optimizer: Callable[[list[Any]], Any] | None = None,
        **settings: Any,
    ) -> None:
        self.name, self.model, self.loss_scale, self.step = name, model, loss_scale, 0
        parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=3e-3) if optimizer is None else optimizer(parameters)
        self.run: Any = apt.Controller(model, self.optimizer, total_steps, **settings) if total_steps else None

    def take(self, steps: int, poison: float | None = None) -> "Loop":
        """Train so many steps; where `poison` goes into a gradient, the optimizer sits that step out."""
        for _ in range(steps):
            self.step += 1
            batch = tiny_batch(self.name, seed=self.step)
            output = self.model(**batch)
            loss = output.loss if self.run is None else self.run.loss(output, batch)
            (loss * self.loss_scale).backward()
            grads = [p.grad for p in self.model.parameters() if p.grad is not None]
            if poison is not None:
                grads[0].view(-1)[0] = poison
            if self.run is not None:
                self.run.after_backward()
            torch._foreach_div_(grads, self.loss_scale)
            if poison is None:
                self.optimizer.step()
            if self.run is not None:
                self.run.after_step()
            self.optimizer.zero_grad()
        return self

    def resumed(self, model: Any, folder: Path, total_steps: int = 30, **settings: Any) -> "Loop":
        """This run as another process takes it up in a freshly patched model, by way of a checkpoint."""
        apt.save_checkpoint(self.run, folder)
        other = Loop(self.name, model, 0)
        other.run = apt.resume_checkpoint(folder, model, other.optimizer, **settings)
        assert other.run.total_steps == total_steps
        other.step = self.step
        return other


def take_both(ours: Loop, theirs: Loop, steps: int) -> None:
    """Train both by the same random numbers."""
    for loop in (ours, theirs):
        torch.manual_seed(5)
        loop.take(steps)


def patched(name: str, dtype: torch.dtype = torch.float64, dropout: float = 0.0, **settings: Any) -> Any:
    dropouts = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout} if dropout else {}
    return apt.patch_model(tiny_model(name, dtype, **dropouts), rank=3, **settings).train()


def equal_bits(ours: Any, theirs: Any) -> bool:
    mine, other = ours.state_dict(), theirs.state_dict()
    return mine.keys() == other.keys() and all(torch.equal(mine[key], other[key]) for key in mine)
