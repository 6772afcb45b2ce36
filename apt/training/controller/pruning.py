"""The pruning half of a run: scores of its steps, masks that fall towards an event, the plan of the event, the cut."""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from apt.apt_config import APTConfig
from apt.families import anatomy_of
from apt.pruning import UnitScores, move_masks, open_units, settle_masks
from apt.pruning.dimensions import Group
from apt.pruning.latency_table import LatencyTable
from apt.pruning.salience import MovingAverage
from apt.records import PrunePlan
from apt.surgery import patch_state
from apt.surgery.prune import apply_prune_plan
from apt.training.controller.calibration import Loss, static_scores
from apt.training.controller.finite import check_scores
from apt.training.controller.goal import Goal
from apt.training.controller.timeline import Timeline


class Pruning:
    """Chooses the units that go at the events of a run, and moves their masks there. It does not say when.

    From its construction on the masks collect statistics, unless all units go before step 1.

    Args:
        model: patched.
        config: which units, how they are scored, target and floors.
        timeline: of the run; units go at one of its events at least.
        latency: with `target_speedup`, the table to price units by; None measures one in `prepare`.

    Raises:
        ValueError: there are no prunable units, or the floors exclude the target.
    """

    def __init__(
        self, model: nn.Module, config: APTConfig, timeline: Timeline, latency: LatencyTable | None = None
    ) -> None:
        self.model, self.config, self.timeline = model, config.pruning, timeline
        anatomy = anatomy_of(model)
        self.goal = Goal(anatomy, self.config, patch_state(model).block_params, latency)
        self.units = UnitScores(anatomy, self.config)
        self.salience = MovingAverage(config.momentum_salience)
        self.prepared = False  # whether the target was checked
        if not self.goal.by_time:
            self.prepare()
        if not timeline.one_shot:
            self.units.collect(True)

    def prepare(self) -> None:
        """Check once that the target can be met; with `target_speedup` measure the latency table if there is none.

        Raises:
            ValueError: the floors, or this device, exclude the target.
        """
        if not self.prepared:
            self.goal.search.check(self.groups, self.goal.live())
            self.prepared = True

    @property
    def groups(self) -> list[Group]:
        """The unit groups at their present sizes."""
        return self.units.groups

    @property
    def scored(self) -> bool:
        """Whether units can be ranked: a step has given scores, or the weights alone do."""
        return bool(self.salience.values) or not self.units.from_data

    def take(self, grad_scale: float, step: int, *, finite: bool) -> None:
        """Take the scores of the step after `step` into the average, and empty the masks.

        Args:
            grad_scale: the loss scaler's factor on the gradients.
            step: optimizer steps done.
            finite: whether the gradients are; scores of a step that is dropped do not count.

        Raises:
            FloatingPointError: the salience of a unit is NaN or infinite.
        """
        if not self.units.from_data:
            return
        scores = self.units.take(grad_scale)
        if finite:
            check_scores(scores, step)
            self.salience.update(scores)

    def calibrate(self, batches: Iterable[Mapping[str, Any]], compute_loss: Loss, grad_scale: float) -> None:
        """Score the units by `calibration_batches` of these batches, nothing trained; see `static_scores`."""
        self.prepare()
        if self.units.from_data:
            self.units.collect(True)
            taken = itertools.islice(batches, self.config.calibration_batches)
            self.salience.values = static_scores(self.model, taken, self.units.take, compute_loss, grad_scale)

    def drive_masks(self, step: int, index: int) -> None:
        """Let the masks fall towards event `index` of those that prune, and hold them from where they are settled."""
        event = self.timeline.prune_steps[index]
        begins, settled = self.timeline.pruning.windows(index)
        if begins < step < settled:
            move_masks(self.groups, self.prune_plan(event).kept, 1.0 / (settled - begins))
        elif step == settled < event:
            settle_masks(self.groups, self.prune_plan(event).kept)

    def prune_plan(self, event: int) -> PrunePlan:
        """What stays at the event of a step, from the present scores."""
        values = self.salience.values if self.units.from_data else self.units.take()
        scores = {group.name: values[group.name] for group in self.groups}
        return self.goal.search.plan(self.groups, scores, self.goal.live(), event, self.timeline.saving_at(event))

    def settled_plan(self, event: int) -> PrunePlan:
        """What the masks keep at the event of a step: they may be settled since some steps, with the scores of then."""
        rested = event > 0 and self.timeline.pruning.windows(self.timeline.prune_steps.index(event))[1] < event
        if not rested or not any(group.mask.masked for group in self.groups):  # or no score came in time to decay
            settle_masks(self.groups, self.prune_plan(event).kept)
        return PrunePlan(
            step=event,
            target_sparsity=self.config.asked(self.timeline.saving_at(event))["target_sparsity"],
            kept=open_units(self.groups),
            round_to=self.config.round_to,
        )

    def cut(self, plan: PrunePlan, optimizer: torch.optim.Optimizer, *, keep_tail: bool) -> None:
        """Carry out a plan on model and optimizer, and on everything here that has an entry a unit.

        Args:
            plan: of the event.
            optimizer: its moments follow.
            keep_tail: whether the dense weights stay behind the student's, for a teacher.
        """
        apply_prune_plan(self.model, plan, optimizer, keep_tail=keep_tail)
        for name, positions in plan.kept.items():
            self.salience.keep(name, torch.tensor(positions, dtype=torch.long))
        self.units.find()

    def after_event(self, *, last: bool) -> None:
        """Forget what was kept of the weights, which have changed; after the last event that prunes close the masks."""
        self.units.outliers.reset()
        if last:
            self.units.collect(False)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs beside the model: JSON values and tensors."""
        return {
            "latency": None if self.goal.table is None else self.goal.table.to_json(),
            "salience": dict(self.salience.values),
            "masks": {group.name: group.mask.values.clone() for group in self.groups},
        }

    def load_state_dict(self, state: Mapping[str, Any], *, collects: bool) -> None:
        """Take up where `state_dict` was made; the model must have the shapes of that moment already.

        Args:
            state: from `state_dict`, and more.
            collects: whether the next step is to be scored.
        """
        self.salience.values = dict(state["salience"])
        for group in self.groups:
            group.mask.set_mask(state["masks"][group.name])
        if state.get("latency") is not None:
            self.goal.take_table(LatencyTable.from_json(state["latency"]))
            self.prepared = True  # the run began with it
        self.units.outliers.reset()
        self.units.collect(collects)
