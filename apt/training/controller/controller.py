"""When: asks the rooms above for scores and plans, hands the plans to surgery, keeps the events."""

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apt.apt_config import APTConfig
from apt.files import append_jsonl
from apt.layers.hidden import hand_on_kernels
from apt.methods import METHODS, RankBudget, penalty
from apt.pruning.dimensions import Group
from apt.pruning.latency_table import LatencyTable
from apt.records import Event, PrunePlan, TrimPlan
from apt.surgery import forget_graphs, patch_state, uncompiled
from apt.surgery.moments import bare_optimizer, check_optimizer
from apt.surgery.ranks import apply_trim_plan
from apt.training.controller.built import check_built, check_one_process
from apt.training.controller.calibration import Loss, model_loss
from apt.training.controller.distillation import Distillation, HeldOut
from apt.training.controller.finite import gradients_are_finite, task_loss
from apt.training.controller.growth import Growth
from apt.training.controller.pruning import Pruning
from apt.training.controller.record import event_now, live_params
from apt.training.controller.timeline import Timeline
from apt.training.controller.verify import LogitCheck
from apt.training.memory import give_back


class Controller:
    """Prunes and tunes a patched model while your loop trains it.

    ``run = Controller(model, optimizer, total_steps)``; then per optimizer step ``loss = run.loss(output, batch)``,
    ``loss.backward()``, ``run.after_backward()`` once after the last micro-batch and before unscaling or clipping,
    ``optimizer.step()``, ``run.after_step()`` before ``zero_grad``.

    Args:
        model: patched by `apt.patch_model`, compiled by ``torch.compile`` before or after that, or not.
        optimizer: over the trainable parameters; AdamW, Adam or SGD. Its moments follow every event.
        total_steps: optimizer steps of the run.
        config: None means the one `patch_model` stored.
        scaler: the gradient scaler of fp16 training, if any.
        event_log: a JSON-lines file that gets each event.
        held_out: with `teacher_refresh`, batches of training data that the student does not learn from, or a function
            from the model to a number that is lower the better it is.
        latency: with `target_speedup`, the table to price units by; None measures one before the first step.
        overrides: leaves of the config by name; what `patch_model` has built already cannot differ.

    Raises:
        ValueError: an unknown or conflicting setting, a run too short for its schedule, a sparsity that the floors
            exclude, a model without prunable units, an optimizer whose moments cannot follow, a distillation that never
            starts, or more than one process.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        total_steps: int,
        config: APTConfig | None = None,
        *,
        scaler: Any = None,
        event_log: Path | None = None,
        held_out: HeldOut | None = None,
        latency: LatencyTable | None = None,
        **overrides: Any,
    ) -> None:
        model = uncompiled(model)
        hand_on_kernels(model)
        state = patch_state(model)
        self.config = (config or state.config).with_overrides(**overrides)
        check_built(self.config, state.config)
        check_one_process()
        self.model, self.total_steps, self.scaler, self.event_log = model, total_steps, scaler, event_log
        self.optimizer = bare_optimizer(optimizer)
        self.step = 0
        self.events: list[Event] = []
        self._check = LogitCheck(model, self.config.verify_events)
        self.timeline = Timeline.of(self.config, total_steps)
        self.growth = Growth(model, self.config, self.timeline.tuning)
        self.importance = self.growth.importance
        budget = METHODS[self.config.method].budget
        if self.timeline.steps or budget is not None:
            check_optimizer(self.optimizer)
        self.budget: RankBudget | None = None  # None where no ranks are removed
        if budget is not None:
            self.budget = budget(model, self.config.rank, self.config.adapter, total_steps)
        self.pruning: Pruning | None = None  # None where no event prunes
        if self.timeline.prune_steps:
            self.pruning = Pruning(model, self.config, self.timeline, latency)
        self.distillation: Distillation | None = None
        settings, over = self.config.distillation, state.distilled
        if settings.use_self_distillation:
            schedule = self.timeline.pruning
            self.distillation = Distillation(model, self.optimizer, settings, schedule, held_out, over=over)
            state.distilled = False

    def prepare(self) -> None:
        """Check that the target can be met; with `target_speedup` measure the latency table, unless there is one.

        With a target sparsity it is done already. Otherwise the first step does it, if nothing else has: a resumed run
        takes the table of its checkpoint instead.

        Raises:
            ValueError: the floors, or this device, exclude the target.
        """
        if self.pruning is not None:
            self.pruning.prepare()

    @property
    def groups(self) -> list[Group]:
        """The unit groups at their present sizes; none where nothing is pruned."""
        return [] if self.pruning is None else self.pruning.groups

    @property
    def active(self) -> bool:
        """Whether an event is still to come."""
        return self._num_scheduled < len(self.timeline.steps)

    @property
    def awaits_calibration(self) -> bool:
        """Whether `prune_before_tuning` is to be called before the first step."""
        return self.timeline.one_shot and not self.events and not self.step

    @property
    def _num_scheduled(self) -> int:
        """Events done of those that have a step of their own in the timeline."""
        return sum(event.trim is None for event in self.events)

    @property
    def _num_pruned(self) -> int:
        """Events done at which units went."""
        return sum(event.prune is not None for event in self.events)

    @property
    def _still_pruning(self) -> Pruning | None:
        """The pruning half, while units are still to go."""
        return self.pruning if self._num_pruned < len(self.timeline.prune_steps) else None

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def _grad_scale(self) -> float:
        """The factor on the gradients until the scaler takes it out."""
        return 1.0 if self.scaler is None else float(self.scaler.get_scale())

    def prune_before_tuning(self, batches: Iterable[Mapping[str, Any]], compute_loss: Loss = model_loss) -> None:
        """Prune to the target at once, before step 1, where the setting `prune_before_tuning` is on (method.md 7.3).

        Scores are summed over the batches, nothing is trained. Salience "magnitude" takes no batch.

        Args:
            batches: training data, inputs and labels on the model's device; `calibration_batches` of them are taken.
            compute_loss: from the model and a batch; by default the loss of the model itself.

        Raises:
            ValueError: the setting is off, it is done already, or there is no batch or no loss.
            FloatingPointError: a loss or score is NaN or infinite.
        """
        if not self.awaits_calibration:
            raise ValueError(
                "controller: prune_before_tuning comes once, before step 1, with the settings prune_before_tuning=True "
                f"and a target_sparsity above 0; at step {self.step} with {len(self.events)} events it cannot"
            )
        assert self.pruning is not None
        self.pruning.calibrate(map(self._check.keep, batches), compute_loss, self._grad_scale)
        self._event()
        self.pruning.salience.reset()
        self.growth.start()

    def loss(self, output: Any, batch: Mapping[str, Any] | None = None) -> Tensor:
        """The loss to differentiate: the task's, and what the method adds to it.

        Args:
            output: what the model returned: an output with ``.loss``, a mapping with ``"loss"``, or the loss itself;
                with distillation it must hold the predictions too.
            batch: the inputs, for the teacher, and kept when `verify_events` is on.

        Raises:
            FloatingPointError: the loss is NaN or infinite; the parameters are still those of the step before.
            ValueError: a teacher is there, and the batch or the predictions are not.
        """
        loss = task_loss(output, self.step)
        if batch is not None:
            self._check.keep(batch)
        if self.distillation is not None:
            loss = self.distillation.loss(loss, output, batch, self.step)
        added = penalty(self.model, self.config.method, self.config.adapter)
        return loss if added is None else loss + added

    def after_backward(self) -> None:
        """Take in the statistics of one optimizer step: call after its last micro-batch, before unscaling or clipping.

        Raises:
            FloatingPointError: a gradient is NaN or infinite (with a scaler the step is dropped instead, as it does),
                or the salience of a unit is.
        """
        finite, scale = gradients_are_finite(self.model, self.step, scaled=self.scaler is not None), self._grad_scale
        if self.budget is not None and finite:
            self.budget.after_backward(self.step + 1, scale)
        if not self.active:
            return
        self.prepare()
        if self.awaits_calibration:
            raise ValueError("controller: call prune_before_tuning(batches) before step 1, as the settings ask for it")
        if self._still_pruning is not None:
            self._still_pruning.take(scale, self.step, finite=finite)
        if finite:
            self.growth.take(scale)

    def after_step(self) -> None:
        """Move the masks, carry out the event that is due: call after ``optimizer.step()``, before ``zero_grad``."""
        self.step += 1
        trim = None if self.budget is None else self.budget.after_step(self.step)
        if trim is not None:
            self._trim(trim)
        if self.distillation is not None:
            self.distillation.prepare(self.step, self._num_pruned, self._num_scheduled)
        if self.active:
            self._towards_event()
        if self.distillation is not None:
            self.distillation.after_step(self.step)

    def _towards_event(self) -> None:
        """Move the masks, and carry out the event where it is due."""
        pruning = self._still_pruning
        if pruning is not None and pruning.scored:
            pruning.drive_masks(self.step, self._num_pruned)
        step = self.timeline.steps[self._num_scheduled]
        chooser = pruning if pruning is not None and step in self.timeline.prune_steps else self.growth
        # Where every step so far overflowed under loss scaling, the event waits for a score.
        if self.step >= step and chooser.scored:
            self._event()

    def _event(self) -> None:
        """Carry out the event whose turn it is."""
        started, step = time.perf_counter(), self.timeline.steps[self._num_scheduled]
        pruning = self._still_pruning if step in self.timeline.prune_steps else None
        prune_plan = None if pruning is None else pruning.settled_plan(step)
        before, logits = live_params(self.model), self._check.logits()
        if prune_plan is not None:
            self._cut(prune_plan)
        rank_plan = self.growth.grow(step, self.optimizer) if step in self.timeline.tuning.events else None
        self._check.compare(step, logits, hidden=any(kind.across_layers for kind in self.config.pruning.kinds))
        told = self.config.pruning.asked(self.timeline.saving_at(step))
        if self.pruning is not None:
            told["predicted_speedup"] = self.pruning.goal.predicted_speedup()
        self._record(event_now(self.model, step, started, before, prune=prune_plan, rank=rank_plan, **told))
        if self.pruning is not None:
            self.pruning.after_event(last=self._still_pruning is None)

    def _cut(self, plan: PrunePlan) -> None:
        """Carry out a prune plan, and let the teacher follow."""
        assert self.pruning is not None
        keep_tail = self.distillation is not None and self.distillation.keeps_tail
        self.pruning.cut(plan, self.optimizer, keep_tail=keep_tail)
        if self.distillation is not None:
            self.distillation.follow()

    def _trim(self, plan: TrimPlan) -> None:
        """Remove the ranks that a budget leaves out for good."""
        started, before, logits = time.perf_counter(), live_params(self.model), self._check.logits()
        apply_trim_plan(self.model, plan, self.optimizer)
        self._check.compare(plan.step, logits)
        asked = self.events[-1].target_sparsity if self.events else 0.0
        told: dict[str, Any] = {"prune": None, "rank": None, "trim": plan, "target_sparsity": asked}
        self._record(event_now(self.model, plan.step, started, before, **told))

    def _record(self, event: Event) -> None:
        self.events.append(event)
        forget_graphs()  # shapes are static between events; start the recompile count anew
        give_back(self._device)
        if self.event_log is not None:
            append_jsonl(self.event_log, event.to_json())

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs beside model and optimizer: JSON values and tensors."""
        nothing: dict[str, Any] = {"latency": None, "salience": {}, "masks": {}}
        distillation, teacher = (None, {}) if self.distillation is None else self.distillation.state_dict()
        return {
            "step": self.step,
            "events": [event.to_json() for event in self.events],
            "start_params": self.growth.start_params,
            "rank_budget": None if self.budget is None else [self.budget.start, self.budget.target],
            "importance": dict(self.importance.values),
            **(nothing if self.pruning is None else self.pruning.state_dict()),
            "distillation": distillation,
            "teacher": teacher,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up where `state_dict` was made; the model must have the shapes of that moment already."""
        self.step = state["step"]
        self.events = [Event.from_json(row) for row in state["events"]]
        self.growth.start_params = state["start_params"]
        if self.budget is not None:
            self.budget.start, self.budget.target = state["rank_budget"]
        self.importance.values = dict(state["importance"])
        if self.pruning is not None:
            collects = self._still_pruning is not None and not self.awaits_calibration
            self.pruning.load_state_dict(state, collects=collects)
        if self.distillation is not None:
            self.distillation.load_state_dict(state["distillation"], state["teacher"], self.step)
