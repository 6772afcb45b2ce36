"""Which units go: their scores, the search, the way of their masks. Decides only; surgery acts."""

from apt.pruner.config import PruningConfig
from apt.pruner.facade import AdaptivePruner
from apt.pruner.masks import move_masks, open_units, settle_masks
from apt.pruner.scores import UnitScores
from apt.pruner.search import LARGEST, UnitSearch

__all__ = [
    "LARGEST",
    "AdaptivePruner",
    "PruningConfig",
    "UnitScores",
    "UnitSearch",
    "move_masks",
    "open_units",
    "settle_masks",
]
