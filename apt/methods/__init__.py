"""Adapter methods on the one adapted linear: what each starts from, what it adds to the loss, how it spends ranks."""

from apt.methods.adalora import RankBudget
from apt.methods.config import MethodConfig
from apt.methods.dynacsg import NAME as GATES
from apt.methods.dynacsg import DynamicSpectral, layers_above, mark_prompt, place_gates, remove_gates
from apt.methods.hypernetwork import HyperNetwork
from apt.methods.lowrank import Joined, LowRank, RankImportance, join, new_factors, updates
from apt.methods.table import METHODS, Method, adapt, penalty
from apt.methods.targets import default_targets, matching, rank_and_scale

__all__ = [
    "GATES",
    "METHODS",
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
    "mark_prompt",
    "matching",
    "new_factors",
    "penalty",
    "place_gates",
    "rank_and_scale",
    "remove_gates",
    "updates",
]
