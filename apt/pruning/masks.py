"""How masks reach 0 or 1 before an event: an even step at a time, then held."""

from collections.abc import Mapping, Sequence

import torch

from apt.pruning.dimensions import Group

Kept = Mapping[str, Sequence[int]]  # positions that stay, by unit group


def move_masks(groups: Sequence[Group], kept: Kept, alpha: float) -> None:
    """One step of the decay: the masks of kept units rise by alpha, the others fall, all within [0, 1]."""
    for group in groups:
        towards = torch.full_like(group.mask.values, -alpha)
        towards[list(kept[group.name])] = alpha
        group.mask.set_mask((group.mask.values + towards).clamp_(0.0, 1.0))


def settle_masks(groups: Sequence[Group], kept: Kept) -> None:
    """End the decay: the masks of kept units are exactly 1, the others exactly 0."""
    for group in groups:
        mask = torch.zeros_like(group.mask.values)
        mask[list(kept[group.name])] = 1.0
        group.mask.set_mask(mask)


def open_units(groups: Sequence[Group]) -> dict[str, list[int]]:
    """The positions whose mask is not 0, by unit group."""
    return {group.name: group.mask.values.nonzero().flatten().tolist() for group in groups}
