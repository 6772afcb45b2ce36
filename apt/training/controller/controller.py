"""When: asks the rooms above for scores and plans, hands the plans to surgery, keeps the events."""

import functools
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apt.apt_config import APTConfig
from apt.files.whole import append_jsonl
from apt.layers.hidden import hand_on_kernels
from apt.methods import METHODS, penalty
from apt.pruning.dimensions import Group
from apt.pruning.latency_table import LatencyTable
from apt.records import Event, Plan, Target
from apt.surgery import bare_model, forget_graphs, keep_ops_whole, patch_state
from apt.surgery.around import tell_copies
from apt.surgery.event import apply_plan
from apt.surgery.moments import bare_optimizer, check_optimizer
from apt.training.controller.built import check_built, check_holds_trained, check_one_process
from apt.training.controller.calibration import Calibration, Loss, model_loss
from apt.training.controller.distillation import Distillation, HeldOut
from apt.training.controller.finite import gradients_are_finite, task_loss
from apt.training.controller.growth import Growth
from apt.training.controller.phase import Phase
from apt.training.controller.progress import Progress
from apt.training.controller.pruning import Pruning
from apt.training.controller.record import live_params, record_event
from apt.training.controller.timeline import Timeline
from apt.training.controller.trimming import Trimming
from apt.training.controller.verify import LogitCheck
from apt.training.memory import give_back


def _keeps_tail(phase: Phase | None) -> bool:
    return phase is not None and phase.keeps_tail


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
        calibration: with `repair`, the training data by which events choose and repair.
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
        calibration: Calibration | None = None,
        **overrides: Any,
    ) -> None:
        model = bare_model(model)
        hand_on_kernels(model)
        state = patch_state(model)
        self.config = (config or state.config).with_overrides(**overrides)
        check_built(self.config, state.config)
        check_one_process()
        self.model = model
        keep_ops_whole()
        self.total_steps = total_steps
        self.scaler = scaler
        self.event_log = event_log
        self.optimizer = bare_optimizer(optimizer)
        check_holds_trained(model, self.optimizer)
        self._check = LogitCheck(model, self.config.verify_events)
        self.timeline = Timeline.of(self.config, total_steps)
        self.progress = Progress(self.timeline)
        self._num_past = len(state.past)  # events of earlier runs of this model, whose shapes it has
        self.growth = Growth(model, self.config, self.timeline)
        self.importance = self.growth.importance
        make_budget = METHODS[self.config.method].budget
        if self.timeline.steps or make_budget is not None:
            check_optimizer(self.optimizer)
        # What decides after every step, in an event of its own: the ranks that a method removes.
        self._unscheduled: list[Phase] = []
        if make_budget is not None:
            budget = make_budget(model, self.config.rank, self.config.adapter, total_steps)
            self._unscheduled = [Trimming(budget)]
        self.distillation: Distillation | None = None
        if self.config.distillation.use_self_distillation:
            self.distillation = self._begin_distillation(held_out)
        self.pruning: Pruning | None = None  # None where no event prunes
        if self.timeline.prune_steps:
            has_teacher = functools.partial(_keeps_tail, self.distillation)
            self.pruning = Pruning(model, self.config, self.timeline, latency, calibration, has_teacher)
        # What decides at the events of the timeline. The teacher is taken before a mask moves, and units go before
        # ranks grow.
        halves = (self.distillation, self.pruning, self.growth)
        self._scheduled: list[Phase] = [phase for phase in halves if phase is not None]
        self.phases = [*self._unscheduled, *self._scheduled]
        self._note_next_event()

    def _begin_distillation(self, held_out: HeldOut | None) -> Distillation:
        """The distillation of this run; over already where a checkpoint from after its end is being taken up."""
        state = patch_state(self.model)
        settings = self.config.distillation
        schedule = self.timeline.pruning
        begun = Distillation(self.model, self.optimizer, settings, schedule, held_out, over=state.distilled)
        state.distilled = False
        return begun

    def prepare(self) -> None:
        """Check that the target can be met; with `target_speedup` measure the latency table, unless there is one.

        With a target sparsity it is done already. Otherwise the first step does it, if nothing else has: a resumed run
        takes the table of its checkpoint instead.

        Raises:
            ValueError: the floors, or this device, exclude the target.
        """
        for phase in self.phases:
            phase.prepare()

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.progress.step

    @property
    def events(self) -> list[Event]:
        """The events done."""
        return self.progress.events

    @property
    def groups(self) -> list[Group]:
        """The unit groups at their present sizes; none where nothing is pruned."""
        return [] if self.pruning is None else self.pruning.groups

    @property
    def active(self) -> bool:
        """Whether an event is still to come."""
        return self.progress.active

    @property
    def settled(self) -> bool:
        """Whether the model keeps its size: no event is still to come, of the timeline or beside it."""
        return not self.active and all(phase.settled(self.step) for phase in self.phases)

    @property
    def awaits_calibration(self) -> bool:
        """Whether `prune_before_tuning` is to be called before the first step."""
        return self.progress.awaits_calibration

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
        self.pruning.calibrate(batches, compute_loss, self._grad_scale)
        self._run_scheduled_event()
        self.pruning.salience.reset()
        self.growth.start()

    def loss(self, output: Any, batch: Mapping[str, Any] | None = None) -> Tensor:
        """The loss to differentiate: the task's, and what the method adds to it.

        Args:
            output: what the model returned: an output with ``.loss``, a mapping with ``"loss"``, or the loss itself;
                with distillation it must hold the predictions too.
            batch: the inputs, for the teacher.

        Raises:
            FloatingPointError: the loss is NaN or infinite; the parameters are still those of the step before.
            ValueError: a teacher is there, and the batch or the predictions are not.
        """
        loss = task_loss(output, self.step)
        for phase in self.phases:
            loss = phase.change_loss(loss, output, batch, self.step)
        added = penalty(self.model, self.config.method, self.config.adapter)
        return loss if added is None else loss + added

    def after_backward(self) -> None:
        """Take in the statistics of one optimizer step: call after its last micro-batch, before unscaling or clipping.

        Raises:
            FloatingPointError: a gradient is NaN or infinite (with a scaler the step is dropped instead, as it does),
                or the salience of a unit is.
        """
        finite = gradients_are_finite(self.model, self.step, scaled=self.scaler is not None)
        if self.active:
            self.prepare()
        if self.awaits_calibration:
            raise ValueError("controller: call prune_before_tuning(batches) before step 1, as the settings ask for it")
        grad_scale = self._grad_scale  # asks the device, once
        for phase in self.phases:
            phase.after_backward(self.progress, grad_scale, finite=finite)

    def after_step(self) -> None:
        """Move the masks, carry out the event that is due: call after ``optimizer.step()``, before ``zero_grad``."""
        self.progress.step += 1
        self._run_unscheduled_event()
        for phase in self.phases:
            phase.before_event(self.progress)
        if self._event_is_due():
            self._run_scheduled_event()
        for phase in self.phases:
            phase.after_step(self.step)

    def _event_is_due(self) -> bool:
        """Whether the next event of the timeline is to come now.

        Where every step so far overflowed under loss scaling, it waits for a score.
        """
        if not self.active or self.step < self.progress.next_event:
            return False
        return all(phase.can_decide(self.progress.next_event) for phase in self._scheduled)

    def _run_scheduled_event(self) -> None:
        """Carry out the next event of the timeline."""
        step = self.progress.next_event
        pruning = self.config.pruning
        hidden = any(kind.across_layers for kind in pruning.kinds)
        self._run_event(step, self._scheduled, pruning.target_at(self.timeline.saving_at(step)), hidden=hidden)
        for phase in self.phases:
            phase.after_event(self.progress)

    def _run_unscheduled_event(self) -> None:
        """Carry out an event beside the timeline, where a phase decides one at this step; it asks for no sparsity."""
        asked = self.events[-1].target_sparsity if self.events else 0.0
        self._run_event(self.step, self._unscheduled, Target(sparsity=asked))

    def _run_event(self, step: int, phases: list[Phase], target: Target, *, hidden: bool = False) -> None:
        """Let each phase decide, at the sizes that the plan before has left, and record what was carried out.

        Args:
            step: of the event.
            phases: that may decide; where none has a plan there is no event.
            target: what is asked for.
            hidden: whether masks on hidden dimensions may stand before it.
        """
        started = time.perf_counter()
        plans: list[Plan] = []
        before = 0
        logits = None
        for phase in phases:
            plan = phase.decide(step)
            if plan is None:
                continue
            if not plans:  # only now, as the first decision settles the masks
                before = live_params(self.model)
                logits = self._check.logits()
            self._carry_out(plan)
            plans.append(plan)
        if not plans:
            return
        self._check.compare(step, logits, hidden=hidden)
        faster = self._predict_speedup(target)
        self._log_event(record_event(self.model, step, plans, target, faster, started=started, before=before))

    def _carry_out(self, plan: Plan) -> None:
        """Apply a plan to model and optimizer, as a replay does, and let every phase follow."""
        keep_tail = any(phase.keeps_tail for phase in self.phases)
        apply_plan(self.model, plan, self.optimizer, keep_tail=keep_tail)
        for phase in self.phases:
            phase.follow(plan)

    def _predict_speedup(self, target: Target) -> float | None:
        """How many times as fast a forward pass is now, by the latency table; None where no speed-up is asked for."""
        if target.speedup is None or self.pruning is None:
            return None
        return self.pruning.goal.predicted_speedup()

    def _log_event(self, event: Event) -> None:
        """Note an event that was carried out, here and in the log."""
        self.events.append(event)
        self._note_next_event()
        patch_state(self.model).past.append(event)
        tell_copies(self.model, event.step)
        forget_graphs()  # shapes are static between events; start the recompile count anew
        give_back(self._device)
        if self.event_log is not None:
            append_jsonl(self.event_log, event.to_json())

    def _note_next_event(self) -> None:
        """Leave on the model the step of the event that is still to come: an export before it says so."""
        patch_state(self.model).next_event = self.progress.next_event if self.active else None

    def leave(self) -> None:
        """End the run where it stands: masks open, the teacher goes; shapes and weights stay."""
        for phase in self.phases:
            phase.leave()

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs beside model and optimizer: JSON values and tensors."""
        state: dict[str, Any] = {"step": self.step, "events": [event.to_json() for event in self.events]}
        past = patch_state(self.model).past[: self._num_past]
        state |= {"past": [event.to_json() for event in past], "built": patch_state(self.model).built}
        for kind in (Growth, Trimming, Pruning, Distillation):
            state |= kind.absent
        for phase in self.phases:
            state |= phase.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up where `state_dict` was made; the model must have the shapes of that moment already."""
        self.progress.step = state["step"]
        self.progress.events = [Event.from_json(row) for row in state["events"]]
        self._num_past = len(state.get("past", []))
        for phase in self.phases:
            phase.load_state_dict(state, self.progress)
        self._note_next_event()
