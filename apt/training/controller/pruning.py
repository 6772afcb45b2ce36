"""The pruning half of a run: scores of its steps, masks that fall towards an event, the plan of the event."""

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from apt.apt_config import APTConfig
from apt.families import anatomy_of
from apt.pruning import UnitScores, move_masks, open_units, settle_masks
from apt.pruning.dimensions import Group
from apt.pruning.latency_table import LatencyTable
from apt.pruning.salience import MovingAverage
from apt.records import Plan, PrunePlan
from apt.surgery import patch_state
from apt.training.controller.calibrated_cut import CalibratedCut
from apt.training.controller.calibration import Calibration, Loss, model_loss, static_scores
from apt.training.controller.finite import check_scores
from apt.training.controller.goal import Goal
from apt.training.controller.phase import Phase
from apt.training.controller.progress import Progress
from apt.training.controller.timeline import Timeline


class Pruning(Phase):
    """Chooses the units that go at the events of a run, and moves their masks there. It does not say when.

    From its construction on the masks collect statistics, unless all units go before step 1, or events repair: then
    masks do not fall either, and an event chooses by calibration batches alone.

    Args:
        model: patched.
        config: which units, how they are scored, target and floors.
        timeline: of the run; units go at one of its events at least.
        latency: with `target_speedup`, the table to price units by; None measures one in `prepare`.
        calibration: for events that repair.
        has_teacher: asked at such an event: whether a teacher reads the weights.

    Raises:
        ValueError: there are no prunable units, the floors exclude the target, or events are to repair without data.
    """

    absent: ClassVar[Mapping[str, Any]] = {"latency": None, "salience": {}, "masks": {}}

    def __init__(
        self,
        model: nn.Module,
        config: APTConfig,
        timeline: Timeline,
        latency: LatencyTable | None = None,
        calibration: Calibration | None = None,
        has_teacher: Callable[[], bool] = lambda: False,
    ) -> None:
        self.model = model
        self.config = config.pruning
        self.timeline = timeline
        anatomy = anatomy_of(model)
        self.goal = Goal(anatomy, self.config, patch_state(model).block_params, latency)
        self.units = UnitScores(anatomy, self.config)
        self.salience = MovingAverage(config.momentum_salience)
        self.prepared = False  # whether the target was checked
        if not self.goal.by_time:
            self.prepare()
        self.calibration = calibration
        self.grad_scale = 1.0  # of the latest step
        self.has_teacher = has_teacher
        if self.repairs and not isinstance(calibration, Calibration) and not timeline.one_shot:
            raise ValueError(
                "controller: events with repair='weights' take calibration data; give Controller(calibration="
                "apt.Calibration(lambda step: batches)), or set repair='off'"
            )
        if not (timeline.one_shot or self.repairs):
            self.units.collect(True)

    @property
    def repairs(self) -> bool:
        """Whether events repair what they cut."""
        return self.config.repair != "off"

    @property
    def _scores_steps(self) -> bool:
        """Whether the steps of the run score units."""
        return self.units.from_data and not self.repairs

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
        return bool(self.salience.values) or not self._scores_steps

    def after_backward(self, progress: Progress, grad_scale: float, *, finite: bool) -> None:
        """Take the scores of the step into the average, and empty the masks, while units are to go.

        Raises:
            FloatingPointError: the salience of a unit is NaN or infinite.
        """
        self.grad_scale = grad_scale
        if not (progress.still_prunes and self._scores_steps):
            return
        scores = self.units.take(grad_scale)
        if finite:
            check_scores(scores, progress.step)
            self.salience.update(scores)

    def calibrate(self, batches: Iterable[Mapping[str, Any]], compute_loss: Loss, grad_scale: float) -> None:
        """Score the units by `calibration_batches` of these batches, nothing trained; see `static_scores`."""
        self.prepare()
        if self.repairs:
            self.calibration = Calibration(lambda _: batches, compute_loss)
            self.grad_scale = grad_scale
        elif self.units.from_data:
            self.units.collect(True)
            count = self.config.calibration_batches
            taken = itertools.islice(batches, count)
            try:
                scores = static_scores(self.model, taken, self.units.take, compute_loss, grad_scale, count)
            finally:
                self.units.collect(False)
            self.salience.values = scores

    def before_event(self, progress: Progress) -> None:
        """Move the masks, while units are to go and can be ranked."""
        if progress.still_prunes and self.scored and not self.repairs:
            self.drive_masks(progress.step, progress.num_pruned)

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

    def can_decide(self, event: int) -> bool:
        return self.scored or event not in self.timeline.prune_steps

    def decide(self, event: int) -> PrunePlan | None:
        """What the masks keep at the event, once they are settled."""
        if event not in self.timeline.prune_steps:
            return None
        if self.repairs:
            return self._repaired_plan(event)
        # Settled since some steps, with the scores of then; or no score came in time to decay.
        masked = any(group.mask.masked for group in self.groups)
        if not (masked and self._rests_before(event)):
            settle_masks(self.groups, self.prune_plan(event).kept)
        return PrunePlan(
            step=event,
            target_sparsity=self.config.target_at(self.timeline.saving_at(event)).sparsity,
            kept=open_units(self.groups),
            round_to=self.config.round_to,
        )

    def _repaired_plan(self, event: int) -> PrunePlan:
        """What stays at the event, chosen on calibration batches; the weights that read it are repaired here."""
        assert self.calibration is not None
        with torch.random.fork_rng(devices=[]):
            count = max(self.config.moment_batches, self.config.calibration_batches)
            batches = list(itertools.islice(self.calibration.batches(event), count))
        if not batches:
            raise ValueError("calibration: there is no batch to score units on; give at least one")
        live = self.goal.live()
        before = max((self.timeline.saving_at(step) for step in self.timeline.prune_steps if step < event), default=0.0)
        asked = self.timeline.saving_at(event) - before

        def choose(scores: dict[str, Tensor], part: float) -> PrunePlan:
            return self.goal.search.plan(self.groups, scores, live, event, before + part * asked)

        compute_loss = self.calibration.compute_loss or model_loss
        scored = self.config.calibration_batches
        cut = CalibratedCut(self.model, self.units, batches, compute_loss, scored, self.grad_scale)
        return cut.carry_out(choose, self.config.rounds, keep_dense=self.has_teacher())

    def _rests_before(self, event: int) -> bool:
        """Whether the masks are to be settled some steps before the event."""
        if event == 0:
            return False
        _, settled = self.timeline.pruning.windows(self.timeline.prune_steps.index(event))
        return settled < event

    def follow(self, plan: Plan) -> None:
        """Drop the units that went, from everything here that has an entry a unit."""
        if isinstance(plan, PrunePlan):
            for name, positions in plan.kept.items():
                self.salience.keep(name, torch.tensor(positions, dtype=torch.long))
            self.units.find()

    def after_event(self, progress: Progress) -> None:
        """Forget what was kept of the weights, which have changed; after the last event that prunes close the masks."""
        self.units.outliers.reset()
        if not progress.still_prunes:
            self.units.collect(False)

    def leave(self) -> None:
        """Open all masks, and keep no statistics."""
        settle_masks(self.groups, {group.name: range(group.num_units) for group in self.groups})
        self.units.outliers.reset()
        self.units.collect(False)

    def state_dict(self) -> dict[str, Any]:
        return {
            "latency": None if self.goal.table is None else self.goal.table.to_json(),
            "salience": dict(self.salience.values),
            "masks": {group.name: group.mask.values.clone() for group in self.groups},
        }

    def load_state_dict(self, state: Mapping[str, Any], progress: Progress) -> None:
        self.salience.values = dict(state["salience"])
        for group in self.groups:
            group.mask.set_mask(state["masks"][group.name])
        if state.get("latency") is not None:
            self.goal.take_table(LatencyTable.from_json(state["latency"]))
            self.prepared = True  # the run began with it
        self.units.outliers.reset()
        self.units.collect(progress.still_prunes and not progress.awaits_calibration and not self.repairs)
