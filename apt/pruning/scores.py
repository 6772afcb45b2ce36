"""The units of a model and the scores that a step gives them."""

import torch
from torch import Tensor

from apt.families import Anatomy
from apt.layers.hidden import HiddenMask
from apt.layers.unit_mask import UnitMask
from apt.pruning.config import PruningConfig
from apt.pruning.dimensions import Group
from apt.pruning.layers import LayerGroup, find_layers
from apt.pruning.salience import SQUARES, OutlierTerm, unit_scores
from apt.pruning.units import find_units


class UnitScores:
    """Finds the units that may go, opens their masks, and reads what a step left there.

    Args:
        anatomy: of a patched model.
        config: which units, and how they are scored.
    """

    def __init__(self, anatomy: Anatomy, config: PruningConfig) -> None:
        self.anatomy = anatomy
        self.config = config
        default = "paper" if anatomy.family.decoder and self.from_data and config.salience != "obs" else "off"
        self.outliers = OutlierTerm(config.kurtosis or default)
        self.masks: dict[UnitMask, bool] = {}  # that collect, and whether their signed inputs too
        self.groups: list[Group] = []
        self.find()

    @property
    def from_data(self) -> bool:
        """Whether scores need passes over data at all."""
        return self.config.salience != "magnitude"

    def find(self) -> None:
        """List the groups at their present sizes: at the start, and after a cut."""
        kinds = self.config.kinds
        floors = {kind.name: self.config.floor_of(kind) for kind in kinds}
        units = [group for group in find_units(self.anatomy, floors) if group.kind in floors]
        across = [kind.find(self.anatomy, floors[kind.name]) for kind in kinds if kind.find is not None]
        layers: list[LayerGroup] = []
        if any(kind.holds_units for kind in kinds):
            layers = find_layers(self.anatomy, units, across[0].costs_by_layer() if across else None)
        self.groups = [*layers, *units, *across]

    def collect(self, on: bool) -> None:
        """Open or close the statistics of every mask whose sums a score needs; they begin at nothing."""
        if on:
            self.collect(False)  # also in masks whose units are all gone
            self.masks = {group.mask: self.outliers.needs_total(group) for group in self.groups}
            self.masks |= dict.fromkeys(self.outliers.inputs(self.groups), True)
        for mask, totals in self.masks.items():
            mask.collecting = on and self.from_data
            mask.products = self.config.salience in ("sum_of_products", "gate_taylor")
            mask.squares = self.config.salience in SQUARES
            mask.totals = totals
            mask.reset_sums()
            if isinstance(mask, HiddenMask):
                mask.sites = self.config.hidden_sites

    def take(self, grad_scale: float = 1.0) -> dict[str, Tensor]:
        """The scores from what the masks hold, which then is nothing; of magnitude, from the weights.

        Args:
            grad_scale: the loss scaler's factor on the gradients.
        """
        scores = {group.name: unit_scores(group, grad_scale, self.config.salience) for group in self.groups}
        if self.config.salience in SQUARES:
            scores = self._per_token(scores)
        scores = self.outliers.add(self.groups, scores)
        for mask in self.masks:
            mask.reset_sums()
        return scores

    def _per_token(self, scores: dict[str, Tensor]) -> dict[str, Tensor]:
        """The scores of heads and neurons as if as many tokens had passed all of them.

        A product of two sums counts the tokens twice, so an encoder that reads more of them than its decoder would be
        worth more for that alone.
        """
        counts = {group.name: group.mask.count for group in self.groups if group.reader is not None}
        if not counts:
            return scores
        most = torch.stack(list(counts.values())).amax()
        return scores | {name: scores[name] * (most / count.clamp(min=1.0)) for name, count in counts.items()}
