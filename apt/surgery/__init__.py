"""The only place where a shape changes: patches a plain model, carries out plans, and undoes the patch."""

from apt.surgery.patch import patch_model, unpatch_model
from apt.surgery.state import PatchState, bare_model, forget_graphs, keep_ops_whole, patch_state, uncompiled
from apt.surgery.summary import Summary, summary
from apt.surgery.targets import find_targets

__all__ = [
    "PatchState",
    "Summary",
    "bare_model",
    "find_targets",
    "forget_graphs",
    "keep_ops_whole",
    "patch_model",
    "patch_state",
    "summary",
    "uncompiled",
    "unpatch_model",
]
