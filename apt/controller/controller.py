"""When: asks the rooms above for scores and plans, hands the plans to surgery, keeps the events."""

import itertools
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apt.adapters import adapted
from apt.controller.calibration import Loss, model_loss, static_scores
from apt.controller.config import APTConfig
from apt.controller.distillation import Distillation, HeldOut
from apt.controller.finite import check_scores, gradients_are_finite, task_loss
from apt.controller.goal import Goal
from apt.controller.state import forget_graphs, patch_state, uncompiled
from apt.controller.timeline import Timeline
from apt.controller.verify import LogitCheck
from apt.dimensions import Group
from apt.families import find_family
from apt.hidden import hand_on_kernels
from apt.methods import METHODS, RankBudget, penalty
from apt.moments import bare_optimizer, check_optimizer
from apt.pruner import UnitScores, move_masks, open_units, settle_masks
from apt.records import Event, PrunePlan, RankPlan, TrimPlan, append_jsonl
from apt.salience import MovingAverage, adapter_importance
from apt.surgery import apply_prune_plan, apply_rank_plan, apply_trim_plan
from apt.times import LatencyTable
from apt.tuner import adapter_sizes, plan_ranks, total_params
from apt.units import block_params

BUILT_IN = (
    "method",
    "prune",
    "rank",
    "scale",
    "target_modules",
    "prompt",
)  # patch_model has built these; a controller cannot change them
BUILT_ADAPTER = (
    *("lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "lora_dropout", "num_directions", "idx"),
    *("adaptive_rank", "importance_threshold"),
    *("gate_alpha", "gate_temperature", "context", "context_layer", "hyper_params"),
)


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
        for name in (*BUILT_IN, *BUILT_ADAPTER):
            asked, built = (getattr(c if name in BUILT_IN else c.adapter, name) for c in (self.config, state.config))
            if asked != built:
                raise ValueError(
                    f"controller: the model was patched with {name}={built!r}, got {asked!r}; patch it anew"
                )
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed and torch.distributed.get_world_size() > 1:
            raise ValueError("controller: this version prunes in one process; train on one device")
        self.model, self.total_steps, self.scaler, self.event_log = model, total_steps, scaler, event_log
        self.optimizer = bare_optimizer(optimizer)
        self.step = 0
        self.events: list[Event] = []
        self.salience = MovingAverage(self.config.momentum_salience)
        self.importance = MovingAverage(self.config.momentum_salience)
        self.units: UnitScores | None = None  # None where nothing is pruned
        self._prepared = False
        self._steps: list[int] = []  # of all events; 0 for the cut before step 1
        self._prune_steps: list[int] = []  # of those at which units go
        self._check = LogitCheck(model, self.config.verify_events)
        self._start_params = total_params(adapter_sizes(model, {}))
        self.distillation: Distillation | None = None
        budget = METHODS[self.config.method].budget
        self.budget: RankBudget | None = None
        if budget is not None:
            check_optimizer(self.optimizer)
            self.budget = budget(model, self.config.rank, self.config.adapter, total_steps)
        if self.config.prunes:
            self._plan_run(state.block_params, latency)
        if self.config.distillation.use_self_distillation:
            if not self._prune_steps or self.timeline.one_shot:
                raise ValueError(
                    "controller: distillation starts at the first event that prunes while the model trains, and this "
                    "run has none; set use_self_distillation to false"
                )
            settings = self.config.distillation
            schedule, over = self.timeline.pruning, state.distilled
            self.distillation = Distillation(model, self.optimizer, settings, schedule, held_out, over=over)
            state.distilled = False

    def _plan_run(self, total: int, latency: LatencyTable | None) -> None:
        """Check that the schedule and the target can be met, and open the gates' statistics."""
        pruning = self.config.pruning
        self.timeline = Timeline.of(self.config, self.total_steps)
        self._steps, self._prune_steps = self.timeline.steps, self.timeline.prune_steps
        if self._steps:
            check_optimizer(self.optimizer)
        self.family = find_family(self.model)
        self.total = total
        self.goal = Goal(self.model, self.family, pruning, total, latency)
        if not self._prune_steps:
            return
        self.units = UnitScores(self.model, self.family, pruning)
        if not self.goal.by_time:
            self.prepare()
        if not self.timeline.one_shot:
            self.units.collect(True)

    def prepare(self) -> None:
        """Check that the target can be met; with `target_speedup` measure the latency table, unless there is one.

        With a target sparsity it is done already. Otherwise the first step does it, if nothing else has: a resumed run
        takes the table of its checkpoint instead.

        Raises:
            ValueError: the floors, or this device, exclude the target.
        """
        if self.units is not None and not self._prepared:
            self.goal.search.check(self.groups, self.goal.live())
            self._prepared = True

    @property
    def groups(self) -> list[Group]:
        """The unit groups at their present sizes; none where nothing is pruned."""
        return [] if self.units is None else self.units.groups

    @property
    def active(self) -> bool:
        """Whether an event is still to come."""
        return self._num_scheduled < len(self._steps)

    @property
    def _num_scheduled(self) -> int:
        """Events done of those that have a step of their own in `_steps`."""
        return sum(event.trim is None for event in self.events)

    @property
    def _num_pruned(self) -> int:
        """Events done at which units went."""
        return sum(event.prune is not None for event in self.events)

    @property
    def _prunes_on(self) -> bool:
        """Whether units are still to go."""
        return self._num_pruned < len(self._prune_steps)

    @property
    def awaits_calibration(self) -> bool:
        """Whether `prune_before_tuning` is to be called before the first step."""
        return self._prune_steps == [0] and not self.events and not self.step

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
        pruning = self.config.pruning
        if not self.awaits_calibration:
            raise ValueError(
                "controller: prune_before_tuning comes once, before step 1, with the settings prune_before_tuning=True "
                f"and a target_sparsity above 0; at step {self.step} with {len(self.events)} events it cannot"
            )
        assert self.units is not None
        self.prepare()
        if self.units.from_data:
            self.units.collect(True)
            scale = 1.0 if self.scaler is None else float(self.scaler.get_scale())
            taken = map(self._check.keep, itertools.islice(batches, pruning.calibration_batches))
            self.salience.values = static_scores(self.model, taken, self.units.take, compute_loss, scale)
        self._event()
        self.salience.reset()
        self._start_params = total_params(
            adapter_sizes(self.model, {})
        )  # the budget grows from what tuning starts with

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
        finite = gradients_are_finite(self.model, self.step, scaled=self.scaler is not None)
        scale = 1.0 if self.scaler is None else float(self.scaler.get_scale())
        if self.budget is not None and finite:
            self.budget.after_backward(self.step + 1, scale)
        if not self.active:
            return
        self.prepare()
        if self.awaits_calibration:
            raise ValueError("controller: call prune_before_tuning(batches) before step 1, as the settings ask for it")
        if self.units is not None and self.units.from_data and self._prunes_on:
            scores = self.units.take(scale)
            if finite:
                check_scores(scores, self.step)
                self.salience.update(scores)
        if finite and self.config.grows:
            adapters = [(name, module) for name, module in adapted(self.model) if module.rank]
            kind = self.config.tuning.importance
            self.importance.update({name: adapter_importance(module, scale, kind) for name, module in adapters})

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
        if self._prunes_on and self._scored:
            self._drive_masks()
        step = self._steps[self._num_scheduled]
        prunes = step in self._prune_steps
        # Where every step so far overflowed under loss scaling, the event waits for a score.
        if self.step >= step and (self._scored if prunes else self.importance.values or not self._start_params):
            self._event()

    @property
    def _scored(self) -> bool:
        return bool(self.salience.values) or (self.units is not None and not self.units.from_data)

    def _drive_masks(self) -> None:
        """Let the masks fall towards the next event that prunes, and hold them from where they are settled."""
        index = self._num_pruned
        begins, settled = self.timeline.pruning.windows(index)
        if begins < self.step < settled:
            move_masks(self.groups, self._prune_plan().kept, 1.0 / (settled - begins))
        elif self.step == settled < self._prune_steps[index]:
            settle_masks(self.groups, self._prune_plan().kept)

    def _prune_plan(self) -> PrunePlan:
        """What stays at the next event that prunes, from the present scores."""
        step = self._prune_steps[self._num_pruned]
        assert self.units is not None
        values = self.salience.values if self.units.from_data else self.units.take()
        scores = {group.name: values[group.name] for group in self.groups}
        return self.goal.search.plan(self.groups, scores, self.goal.live(), step, self._saving_at(step))

    def _saving_at(self, step: int) -> float:
        """The fraction of parameters or time that an event asks to be gone."""
        one_shot = self.timeline.one_shot
        return self.config.pruning.target_saving if one_shot else self.timeline.pruning.get_current_sparsity(step)

    def _event(self) -> None:
        started = time.perf_counter()
        step = self._steps[self._num_scheduled]
        prune_plan = self._settled_plan(step) if step in self._prune_steps else None
        before, logits = block_params(self.model, self.family), self._check.logits()
        if prune_plan is not None:
            self._prune(prune_plan)
        rank_plan = self._rank_plan(step) if step in self.timeline.tuning.events else None
        if rank_plan is not None:
            apply_rank_plan(self.model, rank_plan, self.optimizer)
            self.importance.reset()
        if self.units is not None:
            self.units.outliers.reset()
        self._check.compare(step, logits, hidden="hidden" in self.config.pruning.unit_types)
        live = block_params(self.model, self.family)
        event = Event(
            step=step,
            prune=prune_plan,
            rank=rank_plan,
            **self.goal.asked(self._saving_at(step)),
            predicted_speedup=self.goal.predicted_speedup(),
            sparsity=1.0 - live / self.total,
            removed=(before - live) / self.total,
            block_params=live,
            trainable_params=sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            seconds=time.perf_counter() - started,
        )
        self._record(event)
        if self.units is not None and not self._prunes_on:
            self.units.collect(False)

    def _trim(self, plan: TrimPlan) -> None:
        """Remove the ranks that a budget leaves out for good."""
        started, logits, state = time.perf_counter(), self._check.logits(), patch_state(self.model)
        apply_trim_plan(self.model, plan, self.optimizer)
        self._check.compare(plan.step, logits)
        live = 0 if state.family is None else block_params(self.model, state.family)
        event = Event(
            step=plan.step,
            prune=None,
            rank=None,
            target_sparsity=self.events[-1].target_sparsity if self.events else 0.0,
            sparsity=1.0 - live / state.block_params if state.block_params else 0.0,
            removed=0.0,
            block_params=live,
            trainable_params=sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            seconds=time.perf_counter() - started,
            trim=plan,
        )
        self._record(event)

    def _record(self, event: Event) -> None:
        self.events.append(event)
        forget_graphs()  # shapes are static between events; start the recompile count anew
        if self.event_log is not None:
            append_jsonl(self.event_log, event.to_json())

    def _settled_plan(self, step: int) -> PrunePlan:
        """What the masks keep: they may have been settled some steps ago, with the scores of then."""
        rested = step > 0 and self.timeline.pruning.windows(self._prune_steps.index(step))[1] < step
        if not rested or not any(group.gate.masked for group in self.groups):  # or no score came in time to decay
            settle_masks(self.groups, self._prune_plan().kept)
        return PrunePlan(
            step=step,
            target_sparsity=self.goal.asked(self._saving_at(step))["target_sparsity"],
            kept=open_units(self.groups),
            round_to=self.config.pruning.round_to,
        )

    def _prune(self, plan: PrunePlan) -> None:
        """Cut, with everything that has an entry a unit."""
        keep_tail = self.distillation is not None and self.distillation.keeps_tail
        apply_prune_plan(self.model, plan, self.optimizer, keep_tail=keep_tail)
        if self.distillation is not None:
            self.distillation.follow()
        for name, positions in plan.kept.items():
            self.salience.keep(name, torch.tensor(positions, dtype=torch.long))
        assert self.units is not None
        self.units.find()

    def _rank_plan(self, step: int) -> RankPlan:
        tuning = self.config.tuning
        sizes = adapter_sizes(self.model, {name: float(value) for name, value in self.importance.values.items()})
        budget = int(self._start_params * self.timeline.tuning.budget_ratio(step, tuning.budget_ratio))
        if tuning.max_tuning_params_ratio is not None:
            budget = min(budget, int(tuning.max_tuning_params_ratio * patch_state(self.model).params_before))
        strategy, rule = tuning.rank_increase_strategy, tuning.rule
        return plan_ranks(sizes, step, budget, tuning.max_rank, strategy=strategy, rule=rule)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs beside model and optimizer: JSON values and tensors."""
        distillation, teacher = (None, {}) if self.distillation is None else self.distillation.state_dict()
        return {
            "step": self.step,
            "events": [event.to_json() for event in self.events],
            "start_params": self._start_params,
            "latency": None if self.units is None or self.goal.table is None else self.goal.table.to_json(),
            "rank_budget": None if self.budget is None else [self.budget.start, self.budget.target],
            "salience": dict(self.salience.values),
            "importance": dict(self.importance.values),
            "masks": {group.name: group.gate.mask.clone() for group in self.groups},
            "distillation": distillation,
            "teacher": teacher,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up where `state_dict` was made; the model must have the shapes of that moment already."""
        self.step = state["step"]
        self.events = [Event.from_json(row) for row in state["events"]]
        self._start_params = state["start_params"]
        if self.budget is not None:
            self.budget.start, self.budget.target = state["rank_budget"]
        self.salience.values = dict(state["salience"])
        self.importance.values = dict(state["importance"])
        for group in self.groups:
            group.gate.set_mask(state["masks"][group.name])
        if self.units is not None:
            if state.get("latency") is not None:
                self.goal.take_table(LatencyTable.from_json(state["latency"]))
                self._prepared = True  # the run began with it
            self.units.outliers.reset()
            self.units.collect(self._prunes_on and not self.awaits_calibration)
        if self.distillation is not None:
            self.distillation.load_state_dict(state["distillation"], state["teacher"], self.step)
