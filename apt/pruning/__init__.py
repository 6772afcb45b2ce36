"""What goes and what grows, decided: units, scores, search, ranks. Decides only; `apt.surgery` acts."""

from apt.pruning.config import PruningConfig
from apt.pruning.masks import move_masks, open_units, settle_masks
from apt.pruning.scores import UnitScores
from apt.pruning.search import LARGEST, UnitSearch

__all__ = [
    "LARGEST",
    "PruningConfig",
    "UnitScores",
    "UnitSearch",
    "move_masks",
    "open_units",
    "settle_masks",
]
