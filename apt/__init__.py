"""Fine-tune a pretrained language model and make it smaller and faster while it trains.

APT, Adaptive Pruning and Tuning (arXiv 2401.12200). Names are loaded on first use, so that ``import apt`` stays light.
"""

import importlib
from typing import TYPE_CHECKING, Any

from apt.version import __version__ as __version__

if TYPE_CHECKING:
    from apt.adapters import APTAdapter
    from apt.checkpoint import resume_checkpoint, save_checkpoint
    from apt.controller import APTConfig, Controller
    from apt.distiller import SelfDistiller
    from apt.efficient_finetuning import EfficientFineTuningManager
    from apt.export import export_model, load_model
    from apt.fusion import fuse_adapters
    from apt.patch import patch_model, summary, unpatch_model
    from apt.peft_files import load_adapter, save_adapter
    from apt.prompts import PrefixTuning, PTuningEmbedding
    from apt.pruner import AdaptivePruner
    from apt.schedule import SparsityScheduler
    from apt.trainer import APTrainer
    from apt.tuner import AdaptiveTuner

_ROOMS = {
    "APTAdapter": "adapters",
    "APTConfig": "controller",
    "APTrainer": "trainer",
    "AdaptivePruner": "pruner",
    "AdaptiveTuner": "tuner",
    "Controller": "controller",
    "EfficientFineTuningManager": "efficient_finetuning",
    "PTuningEmbedding": "prompts",
    "PrefixTuning": "prompts",
    "SelfDistiller": "distiller",
    "SparsityScheduler": "schedule",
    "export_model": "export",
    "fuse_adapters": "fusion",
    "load_adapter": "peft_files",
    "load_model": "export",
    "patch_model": "patch",
    "resume_checkpoint": "checkpoint",
    "save_adapter": "peft_files",
    "save_checkpoint": "checkpoint",
    "summary": "patch",
    "unpatch_model": "patch",
}
__all__ = [
    "APTAdapter",
    "APTConfig",
    "APTrainer",
    "AdaptivePruner",
    "AdaptiveTuner",
    "Controller",
    "EfficientFineTuningManager",
    "PTuningEmbedding",
    "PrefixTuning",
    "SelfDistiller",
    "SparsityScheduler",
    "export_model",
    "fuse_adapters",
    "load_adapter",
    "load_model",
    "patch_model",
    "resume_checkpoint",
    "save_adapter",
    "save_checkpoint",
    "summary",
    "unpatch_model",
]


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'apt' has no attribute {name!r}")
    return getattr(importlib.import_module(f"apt.{_ROOMS[name]}"), name)
