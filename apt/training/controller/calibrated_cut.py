"""A cut at one moment, from calibration batches alone: units chosen in rounds, what reads them repaired each time."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from apt.layers.modes import frozen, modes_kept
from apt.layers.passes import passes_of
from apt.process.progress import progress
from apt.pruning import UnitScores, settle_masks
from apt.pruning.layers import without_gone
from apt.pruning.units import UnitGroup
from apt.records import PrunePlan, RepairNote
from apt.repair.bottom_up import BottomUp
from apt.repair.extent import Extent
from apt.repair.moments import Collector, bytes_of, collecting, hold_out
from apt.repair.repairer import Repairer
from apt.repair.unexplained import Unexplained
from apt.training.controller.calibration import Loss, Scores, static_scores

Batch = Mapping[str, Any]
MOST_BYTES = 4 * 1024**3  # of moments on the device; where they need more, the batches pass once more for the next
OBS_STEPS = 12  # in which salience "obs" chooses the units of a round: of two that tell the same, one must stay
Choose = Callable[[Scores, float], PrunePlan]  # from scores, and a part of the way to the event's sparsity


class CalibratedCut:
    """Chooses what stays at an event, and repairs what reads it; masks and weights are those of the cut then.

    Args:
        model: patched, with the masks of `units`.
        units: that may go.
        batches: of calibration data, inputs and labels on the model's device.
        compute_loss: from the model and a batch, to score units by.
        scored: how many of the batches units are scored on, a forward and a backward pass each; the others are passed
            through the model once, for the moments.
        grad_scale: factor on the loss, as in `static_scores`.
    """

    def __init__(
        self,
        model: nn.Module,
        units: UnitScores,
        batches: Sequence[Batch],
        compute_loss: Loss,
        scored: int,
        grad_scale: float = 1.0,
    ) -> None:
        self.model = model
        self.units = units
        self.batches = batches
        self.compute_loss = compute_loss
        self.scored = scored
        self.grad_scale = grad_scale

    def carry_out(self, choose: Choose, rounds: int = 1, *, repair: bool = True, keep_dense: bool = False) -> PrunePlan:
        """Choose in rounds, scored anew between them on the repaired model; set masks and weights.

        What a round shuts stays shut. Every repair starts at the weights from before the first. Where it fails or is
        broken off, masks are open and weights as they were.

        Args:
            choose: the plan from scores, for a fraction of the way to the event's sparsity.
            rounds: at least 1.
            repair: whether the projections that read the units are repaired.
            keep_dense: whether a teacher reads their weights, which then keeps its own.

        Raises:
            FloatingPointError: a loss, a score or an input is NaN or infinite.
        """
        self._open()
        groups = [group for group in self.units.groups if isinstance(group, UnitGroup)] if repair else []
        repairer = Repairer(groups, keep_dense=keep_dense)
        with ExitStack() as undo:
            undo.callback(self._open)
            undo.callback(self.units.collect, False)
            undo.callback(repairer.undo)
            scores, moments = self._first_pass(groups)
            unexplained = self._unexplained(groups, moments)
            for number in range(1, rounds + 1):
                if number > 1:
                    scores = self._score(self.batches)
                for part in self._parts(number, rounds):
                    known = {name: left.scores(scores[name]) for name, left in unexplained.items()}
                    plan = choose(self._shut(scores | known), part)
                    settle_masks(self.units.groups, plan.kept)
                    for name, left in unexplained.items():
                        left.keep(plan.kept[name])
                # What reads units in a layer that goes has nothing to give them to.
                notes = repairer.repair(without_gone(plan.kept), moments, choose_ridge=number == rounds)
                self.units.outliers.reset()  # they were of the weights before
            if repair and self.units.config.repair == "stream":
                notes = self._bottom_up(repairer, plan.kept, notes)
            undo.pop_all()
        return replace(plan, repair=notes if repair else None)

    def _bottom_up(
        self, repairer: Repairer, kept: Mapping[str, Sequence[int]], notes: Mapping[str, RepairNote]
    ) -> dict[str, RepairNote]:
        """Correct the streams; the notes with what that left."""
        if all(len(kept.get(group.name, range(group.num_units))) == group.num_units for group in self.units.groups):
            return dict(notes)
        let_pass = partial(self._pass, self.batches)
        correction = BottomUp(self.units.anatomy, repairer, let_pass, len(self.batches))
        with modes_kept(self.model):
            self.model.eval()
            left = correction.carry_out(without_gone(kept))
        none = RepairNote(ridge=None, before=0.0, after=0.0)
        return dict(notes) | {name: replace(notes.get(name, none), stream=share) for name, share in left.items()}

    def _open(self) -> None:
        settle_masks(self.units.groups, {group.name: range(group.num_units) for group in self.units.groups})

    def _score(self, batches: Iterable[Batch]) -> Scores:
        """Scores of the first `scored` batches; of magnitude, from the weights."""
        if not self.units.from_data:
            return self.units.take()
        self.units.collect(True)
        chosen = itertools.islice(batches, self.scored)
        # The masks alone ask for gradients; a layer that is computed anew needs something before it that does too.
        again = any(getattr(module, "gradient_checkpointing", False) for module in self.model.modules())
        with nullcontext() if again else frozen(self.model):
            scores = static_scores(
                self.model,
                chosen,
                self.units.take,
                self.compute_loss,
                self.grad_scale,
                self.scored,
                training=False,
            )
        self.units.collect(False)
        return scores

    def _parts(self, number: int, rounds: int) -> list[float]:
        """How far towards the event's sparsity a round goes, in one step or in several."""
        steps = OBS_STEPS if self._by_obs else 1
        return [(number - 1 + step / steps) / rounds for step in range(1, steps + 1)]

    @property
    def _by_obs(self) -> bool:
        return self.units.config.salience == "obs"

    def _unexplained(self, groups: Sequence[UnitGroup], moments: Mapping[str, Collector]) -> dict[str, Unexplained]:
        """What salience "obs" asks of the moments, by unit group; nothing for another.

        Raises:
            FloatingPointError: a moment holds a number that is NaN or infinite.
        """
        found = {}
        for group in groups if self._by_obs else ():
            moment = moments[group.name].whole.to(group.mask.values.device)
            with_bias = group.reader.view()[1] is not None
            try:
                found[group.name] = Unexplained.of(moment, group.mask.unit_size, with_bias=with_bias)
            except FloatingPointError as error:
                raise FloatingPointError(
                    f"salience: of {group.name} {error}; look at the calibration batches"
                ) from None
        return found

    def _shut(self, scores: Scores) -> Scores:
        """The scores with 0 for the units that an earlier round shut."""
        return {group.name: scores[group.name] * (group.mask.values > 0) for group in self.units.groups}

    def _first_pass(self, groups: Sequence[UnitGroup]) -> tuple[Scores, dict[str, Collector]]:
        """The scores of the model as it is, and the moments of what the groups' projections read in all batches."""
        moments: dict[str, Collector] = {}
        scores: Scores = {}
        lists = _in_memory(groups)
        for number, some in enumerate(lists):
            readers = [group.reader for group in some]
            with collecting(readers) as collectors:
                batches = self._numbered(collectors)
                if number == 0 and self.grad_scale == 1.0:
                    scores = self._score(batches)  # and the moments of the same passes
                self._pass(batches, readers)
            for collector in collectors if len(lists) > 1 else ():
                collector.to("cpu")
            moments |= {group.name: collector for group, collector in zip(some, collectors, strict=True)}
        if self.grad_scale != 1.0:  # a batch that overflows passes again, and would count twice
            scores = self._score(self.batches)
        return scores, moments

    def _numbered(self, collectors: Sequence[Collector]) -> Iterator[Batch]:
        """The batches, some of them held out."""
        for number, batch in enumerate(self.batches):
            hold_out(collectors, number, len(self.batches))
            yield batch

    @torch.no_grad()
    def _pass(self, batches: Iterable[Batch], heard: Sequence[nn.Module]) -> None:
        """Let what is left of the batches pass through the model, as far as these modules."""
        passes, extent = passes_of(self.model), Extent(heard)
        with modes_kept(self.model), nullcontext() if passes is None else passes.counting():
            self.model.eval()
            for batch in progress(batches, "moments", total=len(self.batches)):
                with extent.one_pass():
                    self.compute_loss(self.model, batch)


def _in_memory(groups: Sequence[UnitGroup]) -> list[list[UnitGroup]]:
    """The groups in their order, as many together as have moments in `MOST_BYTES`; at least one list."""
    lists: list[list[UnitGroup]] = [[]]
    used = 0
    for group in groups:
        size = bytes_of(group.reader)
        if lists[-1] and used + size > MOST_BYTES:
            lists.append([])
            used = 0
        lists[-1].append(group)
        used += size
    return lists
