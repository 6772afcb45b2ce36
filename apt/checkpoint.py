"""Old names of `apt.training.checkpoint`; use `apt.save_checkpoint` and `apt.resume_checkpoint`."""

import warnings

from apt.training.checkpoint import load_controller, restore_shapes, save_controller

__all__ = ["load_controller", "restore_shapes", "save_controller"]

warnings.warn(
    "apt.checkpoint is deprecated; use apt.save_checkpoint(run, folder) and apt.resume_checkpoint(folder, model, "
    "optimizer)",
    DeprecationWarning,
    stacklevel=2,
)
