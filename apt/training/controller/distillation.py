"""When the teacher is taken, how much it weighs at a step, when another takes its place, and when it goes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from apt.distillation import DistillationConfig, SelfDistiller
from apt.layers import LayerTransform, adapted
from apt.layers.modes import evaluating
from apt.pruning.schedule import SparsityScheduler, loss_weight, to_steps
from apt.surgery.moments import forget
from apt.surgery.tails import free_tails
from apt.training.memory import give_back

HeldOut = Callable[[nn.Module], float] | Sequence[Mapping[str, Any]]


class Distillation:
    """Self-distillation of a run (method.md 6).

    The teacher is the student as it stands before the first mask falls. From the first event that prunes on it
    teaches, and every event leaves the dense weights behind the student's; at `distill_end` all of it goes.

    Args:
        model: patched by `apt.patch_model`.
        optimizer: Tr joins its group of adapters, at the end, unless it stands there already.
        config: the settings.
        schedule: when units go.
        held_out: for `teacher_refresh`: batches of training data that the student does not learn from, or a function
            from the model to a number that is lower the better the model is. The mean loss on the batches is that.
        over: it has ended, in the checkpoint that the run is to be taken up from.

    Raises:
        ValueError: no event prunes, distillation ends before the first that does, or `held_out` is missing.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: DistillationConfig,
        schedule: SparsityScheduler,
        held_out: HeldOut | None = None,
        *,
        over: bool = False,
    ) -> None:
        self.model, self.optimizer, self.config, self.schedule = model, optimizer, config, schedule
        pruning = [step for step in schedule.events if schedule.get_current_sparsity(step) > 0.0]
        if not pruning:
            raise ValueError(
                "distillation: it starts at the first event that prunes while the model trains, and this run has none; "
                "set use_self_distillation to false"
            )
        self.first, total = pruning[0], schedule.total_steps
        self.end = min(to_steps(config.distill_end, total), total)
        if self.end <= self.first:
            raise ValueError(
                f"distillation: distill_end is step {self.end}, but the first event that prunes comes after step "
                f"{self.first}; raise distill_end"
            )
        if config.teacher_refresh and not held_out:
            raise ValueError(
                "distillation: teacher_refresh compares student and teacher on training data that is held out; give "
                "the controller held_out=, batches or a function of the model, or use APTrainer"
            )
        self.held_out = held_out
        self.distiller = SelfDistiller(model, config=config, seed=torch.initial_seed())
        self.over = over
        if over:
            self.distiller.drop()
        else:
            adopt(self.distiller.transform, model, optimizer)
        self.started = False  # whether an event has pruned since there is a teacher
        self.prepared = 0  # events before whose window it was asked whether a teacher is to be taken
        self.since_event: int | None = None  # events of the run before the snapshot
        self.teacher_score: float | None = None  # of the teacher on held-out data, lower is better
        self.snapshots: list[int] = []  # optimizer steps
        self._sums: dict[str, Tensor] = {}
        self._count = 0
        self.distiller.listen(False)
        self._draw = self.distiller.draw_state()  # after the latest step: a loss of one that fails has drawn since

    @property
    def keeps_tail(self) -> bool:
        """Whether an event must leave the dense weights behind the student's."""
        return self.distiller.has_teacher and not self.over

    def teaches(self, step: int) -> bool:
        """Whether the step after `step` is distilled."""
        return self.started and not self.over and step < self.end and step % self.config.distill_every == 0

    def weight(self, step: int) -> float:
        """mu of a step: of the distillation loss; that of the task weighs the rest."""
        begins = self.schedule.start if self.config.mu_ramp == "window" else self.first
        first, last = self.config.distill_loss_weight_start, self.config.distill_loss_weight_end
        return loss_weight(step, begins, self.schedule.end, first, last)

    def loss(self, task: Tensor, output: Any, batch: Mapping[str, Any] | None, step: int) -> Tensor:
        """``mu * L_distill + (1 - mu) * L_task`` of a micro-batch after `step` optimizer steps, or L_task alone.

        Raises:
            ValueError: there is no batch, or the output names no predictions.
        """
        if not self.teaches(step):
            return task
        if batch is None:
            raise ValueError("distillation: the teacher needs the batch; call run.loss(output, batch)")
        teacher = self.distiller.forward_teacher(batch)
        distilled = self.distiller.compute_distill_loss(output, teacher, batch)
        mu = self.weight(step + 1)
        self._count += 1
        seen = {"task_loss": task.detach(), "distill_loss": distilled.detach(), "mu": torch.tensor(mu)}
        self._sums = {name: value + self._sums.get(name, 0.0) for name, value in seen.items()}
        return mu * distilled + (1.0 - mu) * task

    def report(self) -> dict[str, float]:
        """Means of task loss, distillation loss and mu over the micro-batches distilled since the last call."""
        means = {name: float(value) / self._count for name, value in self._sums.items()}
        self._sums, self._count = {}, 0
        return means

    def account(self) -> dict[str, Any]:
        """Which optimizer steps are distilled, and after which ones a teacher was taken: for the metrics of a run."""
        return {"first_step": self.first + 1, "last_step": self.end, "teacher_of_steps": self.snapshots}

    def prepare(self, step: int, pruned: int, events: int) -> None:
        """Before a mask moves: take the student for the teacher where it is time and, if it is the second, better.

        Args:
            step: optimizer steps done.
            pruned: events done at which units went.
            events: events done.
        """
        steps = self.schedule.events
        if self.over or pruned >= len(steps) or self.prepared > pruned:
            return
        if step < self.schedule.windows(pruned)[0] or not self.schedule.get_current_sparsity(steps[pruned]) > 0.0:
            return
        self.prepared = pruned + 1
        score = self._score() if self.config.teacher_refresh else None
        if self.distiller.has_teacher and (
            score is None or self.teacher_score is None or not score < self.teacher_score
        ):
            return
        free_tails(self.model, self.optimizer)
        self.distiller.snapshot()
        self.since_event, self.teacher_score = events, score
        self.snapshots.append(step)

    def _score(self) -> float:
        """Of the student as it is, on held-out data."""
        assert self.held_out is not None
        devices = [p.device for p in self.model.parameters() if p.device.type == "cuda"][:1]
        with torch.random.fork_rng(devices=devices), torch.no_grad(), evaluating(self.model):
            if callable(self.held_out):
                return float(self.held_out(self.model))
            total, rows = 0.0, 0
            for batch in self.held_out:
                size = len(next(iter(batch.values())))
                total, rows = total + float(self.model(**batch).loss) * size, rows + size
            return total / rows

    def follow(self) -> None:
        """After an event at which units went."""
        self.started = self.started or self.keeps_tail
        if not self.over:
            self.distiller.follow()

    def after_step(self, step: int) -> None:
        """Let all of it go where it is time; otherwise say whether the next pass is to be caught."""
        if step >= self.end and not self.over:
            self._finish()
        elif not self.over:
            self.distiller.listen(self.teaches(step))
            self._draw = self.distiller.draw_state()

    def _finish(self) -> None:
        forget(self.distiller.transform.parameters(), self.optimizer)
        self.distiller.drop()
        free_tails(self.model)
        give_back(next(self.model.parameters()).device)
        self.over = True

    def state_dict(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """JSON values and tensors; Tr is in the model's own state."""
        plain = {
            "over": self.over,
            "started": self.started,
            "prepared": self.prepared,
            "since_event": self.since_event,
            "teacher_score": self.teacher_score,
            "snapshots": self.snapshots,
            "counts": self.distiller.teacher.counts if self.keeps_tail else None,
            "transform_rank": self.config.transform_rank,
        }
        return plain, {} if self.over else self.distiller.state_dict() | self._draw

    def load_state_dict(self, plain: dict[str, Any], tensors: dict[str, Tensor], step: int) -> None:
        """Take up where `state_dict` was made."""
        self.started, self.prepared, self.since_event = plain["started"], plain["prepared"], plain["since_event"]
        self.teacher_score, self.snapshots = plain["teacher_score"], list(plain["snapshots"])
        if plain["over"]:
            if not self.over:
                self._finish()
            return
        self.distiller.load_state_dict(tensors, plain["counts"])
        self.after_step(step)


def adopt(transform: LayerTransform, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put Tr at the end of the optimizer's first group of adapters, wherever it stood: a saved state has it there."""
    ours = {id(parameter) for parameter in transform.parameters()}
    adapters = {id(p) for _, linear in adapted(model) for p in linear.adapter_parameters()}
    groups = optimizer.param_groups
    home = next((group for group in groups if any(id(p) in adapters for p in group["params"])), groups[-1])
    for group in groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in ours]
    home["params"] = [*home["params"], *transform.parameters()]
