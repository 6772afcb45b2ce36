"""Adapter methods on the one adapted linear: what each starts from, what it adds to the loss, how it spends ranks."""

from apt.methods.adalora import RankBudget
from apt.methods.config import MethodConfig
from apt.methods.dynacsg import NAME as ROW_GATES
from apt.methods.dynacsg import DynamicSpectral, layers_above, place_row_gates, remove_row_gates
from apt.methods.hypernetwork import HyperNetwork
from apt.methods.lowrank import Joined, LowRank, RankImportance, join, new_factors, updates
from apt.methods.table import METHODS, Method, adapt, penalty
from apt.methods.targets import default_targets, matching, rank_and_scale

__all__ = [
    "METHODS",
    "ROW_GATES",
    "DynamicSpectral",
    "HyperNetwork",
    "Joined",
    "LowRank",
    "Method",
    "MethodConfig",
    "RankBudget",
    "RankImportance",
    "adapt",
    "default_targets",
    "join",
    "layers_above",
    "matching",
    "new_factors",
    "penalty",
    "place_row_gates",
    "rank_and_scale",
    "remove_row_gates",
    "updates",
]
