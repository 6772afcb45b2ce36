"""When the teacher is taken, how much it weighs at a step, when another takes its place, and when it goes."""

from collections.abc import Callable, Mapping, Sequence
from enum import Enum, auto
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from apt.distillation import DistillationConfig, SelfDistiller
from apt.layers import LayerTransform, adapted
from apt.layers.modes import evaluating
from apt.pruning.schedule import SparsityScheduler, loss_weight, to_steps
from apt.records import Plan, PrunePlan
from apt.surgery.moments import forget
from apt.surgery.tails import free_tails
from apt.training.controller.phase import Phase
from apt.training.controller.progress import Progress
from apt.training.memory import give_back

HeldOut = Callable[[nn.Module], float] | Sequence[Mapping[str, Any]]


class Stage(Enum):
    """Where a distillation stands."""

    WAITING = auto()  # no event has pruned since there is a teacher, if there is one
    TEACHING = auto()
    OVER = auto()


class Distillation(Phase):
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

    absent: ClassVar[Mapping[str, Any]] = {"distillation": None, "teacher": {}}

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
        self.model = model
        self.optimizer = optimizer
        self.config = config
        self.schedule = schedule
        pruning = [step for step in schedule.events if schedule.get_current_sparsity(step) > 0.0]
        if not pruning:
            raise ValueError(
                "distillation: it starts at the first event that prunes while the model trains, and this run has none; "
                "set use_self_distillation to false"
            )
        self.first = pruning[0]
        self.end = min(to_steps(config.distill_end, schedule.total_steps), schedule.total_steps)
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
        self.stage = Stage.OVER if over else Stage.WAITING
        if over:
            self.distiller.drop()
        else:
            adopt(self.distiller.transform, model, optimizer)
        self.num_windows = 0  # before which it was asked whether a teacher is to be taken
        self.since_event: int | None = None  # events of the run before the snapshot
        self.teacher_score: float | None = None  # of the teacher on held-out data, lower is better
        self.snapshots: list[int] = []  # optimizer steps
        self._sums: dict[str, Tensor] = {}
        self._count = 0
        self.distiller.listen(False)
        self._draw = self.distiller.draw_state()  # after the latest step: a loss of one that fails has drawn since

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self.stage is Stage.OVER

    @property
    def keeps_tail(self) -> bool:
        """Whether there is a teacher, which needs the dense weights."""
        return self.distiller.has_teacher

    def teaches(self, step: int) -> bool:
        """Whether the step after `step` is distilled."""
        is_time = step < self.end and step % self.config.distill_every == 0
        return is_time and self.stage is Stage.TEACHING

    def weight(self, step: int) -> float:
        """mu of a step: of the distillation loss; that of the task weighs the rest."""
        begins = self.schedule.start if self.config.mu_ramp == "window" else self.first
        first, last = self.config.distill_loss_weight_start, self.config.distill_loss_weight_end
        return loss_weight(step, begins, self.schedule.end, first, last)

    def change_loss(self, loss: Tensor, output: Any, batch: Mapping[str, Any] | None, step: int) -> Tensor:
        """``mu * L_distill + (1 - mu) * L_task`` of a micro-batch after `step` optimizer steps, or L_task alone.

        Raises:
            ValueError: there is no batch, or the output names no predictions.
        """
        if not self.teaches(step):
            return loss
        if batch is None:
            raise ValueError("distillation: the teacher needs the batch; call run.loss(output, batch)")
        teacher = self.distiller.forward_teacher(batch)
        distilled = self.distiller.compute_distill_loss(output, teacher, batch)
        mu = self.weight(step + 1)
        self._count += 1
        seen = {"task_loss": loss.detach(), "distill_loss": distilled.detach(), "mu": torch.tensor(mu)}
        self._sums = {name: value + self._sums.get(name, 0.0) for name, value in seen.items()}
        return mu * distilled + (1.0 - mu) * loss

    def report(self) -> dict[str, float]:
        """Means of task loss, distillation loss and mu over the micro-batches distilled since the last call."""
        means = {name: float(value) / self._count for name, value in self._sums.items()}
        self._sums = {}
        self._count = 0
        return means

    def account(self) -> dict[str, Any]:
        """Which optimizer steps are distilled, and after which ones a teacher was taken: for the metrics of a run."""
        return {"first_step": self.first + 1, "last_step": self.end, "teacher_of_steps": self.snapshots}

    def before_event(self, progress: Progress) -> None:
        """Take a teacher before a mask moves: this phase comes before the one that prunes."""
        self.take_teacher_if_due(progress)

    def take_teacher_if_due(self, progress: Progress) -> None:
        """Take the student for the teacher where it is time and, if it is the second, better."""
        if not self._is_before_a_window(progress):
            return
        self.num_windows = progress.num_pruned + 1
        score = self._score_student() if self.config.teacher_refresh else None
        if self.distiller.has_teacher and not self._beats_teacher(score):
            return
        free_tails(self.model, self.optimizer)
        self.distiller.snapshot()
        self.since_event = len(progress.events)
        self.teacher_score = score
        self.snapshots.append(progress.step)

    def _is_before_a_window(self, progress: Progress) -> bool:
        """Whether the masks are about to fall towards an event that prunes, and it was not asked at that one yet."""
        events = self.schedule.events
        index = progress.num_pruned
        if self.over or index >= len(events) or self.num_windows > index:
            return False
        begins, _ = self.schedule.windows(index)
        return progress.step >= begins and self.schedule.get_current_sparsity(events[index]) > 0.0

    def _beats_teacher(self, score: float | None) -> bool:
        """Whether the student's score on held-out data is lower than its teacher's was; False without scores."""
        return score is not None and self.teacher_score is not None and score < self.teacher_score

    def _score_student(self) -> float:
        """The loss of the student as it is, on held-out data."""
        assert self.held_out is not None
        devices = [p.device for p in self.model.parameters() if p.device.type == "cuda"][:1]
        with torch.random.fork_rng(devices=devices), torch.no_grad(), evaluating(self.model):
            if callable(self.held_out):
                return float(self.held_out(self.model))
            total = 0.0
            rows = 0
            for batch in self.held_out:
                size = len(next(iter(batch.values())))
                total += float(self.model(**batch).loss) * size
                rows += size
            return total / rows

    def follow(self, plan: Plan) -> None:
        """Begin to teach, if there is a teacher, and look again at which layers are left, after a cut."""
        if self.over or not isinstance(plan, PrunePlan):
            return
        if self.distiller.has_teacher:
            self.stage = Stage.TEACHING
        self.distiller.follow()

    def after_step(self, step: int) -> None:
        """Let all of it go where it is time; otherwise say whether the next pass is to be caught."""
        if self.over:
            return
        if step >= self.end:
            self._let_teacher_go()
        else:
            self.distiller.listen(self.teaches(step))
            self._draw = self.distiller.draw_state()

    def leave(self) -> None:
        """Let the teacher go, and Tr."""
        if not self.over:
            self._let_teacher_go()

    def _let_teacher_go(self) -> None:
        forget(self.distiller.transform.parameters(), self.optimizer)
        self.distiller.drop()
        free_tails(self.model)
        give_back(next(self.model.parameters()).device)
        self.stage = Stage.OVER

    def state_dict(self) -> dict[str, Any]:
        """JSON values, and the tensors of the teacher; Tr is in the model's own state."""
        plain = {
            "over": self.over,
            "started": self.stage is not Stage.WAITING,
            "prepared": self.num_windows,
            "since_event": self.since_event,
            "teacher_score": self.teacher_score,
            "snapshots": self.snapshots,
            "counts": self.distiller.teacher.counts if self.keeps_tail else None,
            "transform_rank": self.config.transform_rank,
        }
        teacher = {} if self.over else self.distiller.state_dict() | self._draw
        return {"distillation": plain, "teacher": teacher}

    def load_state_dict(self, state: Mapping[str, Any], progress: Progress) -> None:
        plain = state["distillation"]
        if plain is None:
            raise ValueError(
                "distillation: the checkpoint is of a run without a teacher, and none can be taken up in its middle; "
                "resume with use_self_distillation=False"
            )
        self.num_windows = plain["prepared"]
        self.since_event = plain["since_event"]
        self.teacher_score = plain["teacher_score"]
        self.snapshots = list(plain["snapshots"])
        if plain["over"]:
            if not self.over:
                self._let_teacher_go()
            return
        if plain["started"]:
            self.stage = Stage.TEACHING
        self.distiller.load_state_dict(state["teacher"], plain["counts"])
        self.after_step(progress.step)


def adopt(transform: LayerTransform, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put Tr at the end of the optimizer's first group of adapters, wherever it stood: a saved state has it there."""
    ours = {id(parameter) for parameter in transform.parameters()}
    adapters = {id(p) for _, linear in adapted(model) for p in linear.adapter_parameters()}
    groups = optimizer.param_groups
    home = next((group for group in groups if any(id(p) in adapters for p in group["params"])), groups[-1])
    for group in groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in ours]
    home["params"] = [*home["params"], *transform.parameters()]
