"""When what happens in a run: the controller, and what it does at each moment."""

from apt.training.controller.controller import Controller
from apt.training.controller.distillation import Distillation, adopt

__all__ = [
    "Controller",
    "Distillation",
    "adopt",
]
