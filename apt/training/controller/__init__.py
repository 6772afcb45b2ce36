"""The controller, which says when what happens in a run, and the phases that it calls."""

from apt.training.controller.calibration import Calibration
from apt.training.controller.controller import Controller
from apt.training.controller.distillation import Distillation, adopt

__all__ = [
    "Calibration",
    "Controller",
    "Distillation",
    "adopt",
]
