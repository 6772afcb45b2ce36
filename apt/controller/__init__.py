"""When what happens in a run: its settings, what a patched model carries, and the controller itself."""

from apt.controller.config import METHODS, APTConfig
from apt.controller.controller import Controller
from apt.controller.state import PatchState, patch_state

__all__ = ["METHODS", "APTConfig", "Controller", "PatchState", "patch_state"]
