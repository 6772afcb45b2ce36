"""Ablations of the paper as one setting: each stands for a few others, which it overrules."""

import difflib
from typing import Any

from apt.pruner import PruningConfig
from apt.tuner import TuningConfig

Changes = dict[str, dict[str, Any]]  # section of the config -> leaf -> value

ABLATIONS: dict[str, Changes] = {
    "full": {},
    "w/o_Ap": {
        "pruning": {
            "target_sparsity": 0.0,
            "target_speedup": None,
            "num_events": 0,
            "update_frequency": None,
            "prune_before_tuning": False,
        },
        "distillation": {"use_self_distillation": False},
    },  # ranks grow all the same: see `changes_of`
    "w/o_AT": {"tuning": {"adaptive_rank_update": False}},
    "w/o_Ds": {"distillation": {"use_self_distillation": False}},
    "w/o_kurtosis": {"pruning": {"kurtosis": "off"}},
    "uniform_growth": {"tuning": {"rank_increase_strategy": "uniform"}},
}


def changes_of(ablation: str, pruning: PruningConfig, tuning: TuningConfig) -> Changes:
    """The leaves that an ablation sets, by section. Applying them twice is applying them once.

    Raises:
        ValueError: there is no such ablation; the nearest is named.
    """
    if ablation not in ABLATIONS:
        lower = {name.lower(): name for name in ABLATIONS}
        near = [lower[name] for name in difflib.get_close_matches(str(ablation).lower(), lower, n=1, cutoff=0.3)]
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"config: unknown ablation {ablation!r}; {hint}there are {', '.join(ABLATIONS)}")
    changes = {section: dict(leaves) for section, leaves in ABLATIONS[ablation].items()}
    if ablation == "w/o_Ap" and tuning.num_tuning_events is None and tuning.growth_frequency is None:
        often = pruning.update_frequency  # ranks grow when they would have grown with pruning
        changes["tuning"] = {"num_tuning_events": pruning.num_events} if often is None else {"growth_frequency": often}
    return changes
