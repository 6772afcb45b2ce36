"""When what happens in a run: its settings, what a patched model carries, and the controller itself."""

from apt.controller.ablations import ABLATIONS, changes_of
from apt.controller.config import APTConfig
from apt.controller.controller import Controller
from apt.controller.distillation import Distillation, adopt
from apt.controller.state import PatchState, forget_graphs, patch_state, uncompiled

__all__ = [
    "ABLATIONS",
    "APTConfig",
    "Controller",
    "Distillation",
    "PatchState",
    "adopt",
    "changes_of",
    "forget_graphs",
    "patch_state",
    "uncompiled",
]
