"""Fine-tune a pretrained language model and make it smaller and faster while it trains.

APT, Adaptive Pruning and Tuning (arXiv 2401.12200). Names are loaded on first use, so that ``import apt`` stays light.
"""

import importlib
from typing import TYPE_CHECKING, Any

from apt.version import __version__ as __version__

if TYPE_CHECKING:
    from apt.apt_config import APTConfig
    from apt.deploy.export import export_model
    from apt.distillation import SelfDistiller
    from apt.efficient_finetuning import EfficientFineTuningManager
    from apt.export import load_model
    from apt.export.fuse import fuse_adapters
    from apt.export.peft import load_adapter, save_adapter
    from apt.layers import APTAdapter
    from apt.methods.prompts import PrefixTuning, PTuningEmbedding
    from apt.pruning.schedule import SparsityScheduler
    from apt.surgery import patch_model, unpatch_model
    from apt.surgery.summary import summary
    from apt.training.adaptive_pruner import AdaptivePruner
    from apt.training.adaptive_tuner import AdaptiveTuner
    from apt.training.checkpoint import resume_checkpoint, save_checkpoint
    from apt.training.compress import compress
    from apt.training.controller import Calibration, Controller
    from apt.training.trainer import APTrainer, trainer_class

_HOMES = {
    "APTAdapter": "layers",
    "APTConfig": "apt_config",
    "APTrainer": "training.trainer",
    "AdaptivePruner": "training.adaptive_pruner",
    "AdaptiveTuner": "training.adaptive_tuner",
    "Calibration": "training.controller",
    "Controller": "training.controller",
    "EfficientFineTuningManager": "efficient_finetuning",
    "PTuningEmbedding": "methods.prompts",
    "PrefixTuning": "methods.prompts",
    "SelfDistiller": "distillation",
    "SparsityScheduler": "pruning.schedule",
    "compress": "training.compress",
    "export_model": "deploy.export",
    "fuse_adapters": "export.fuse",
    "load_adapter": "export.peft",
    "load_model": "export",
    "patch_model": "surgery",
    "resume_checkpoint": "training.checkpoint",
    "save_adapter": "export.peft",
    "save_checkpoint": "training.checkpoint",
    "summary": "surgery",
    "trainer_class": "training.trainer",
    "unpatch_model": "surgery",
}
__all__ = [
    "APTAdapter",
    "APTConfig",
    "APTrainer",
    "AdaptivePruner",
    "AdaptiveTuner",
    "Calibration",
    "Controller",
    "EfficientFineTuningManager",
    "PTuningEmbedding",
    "PrefixTuning",
    "SelfDistiller",
    "SparsityScheduler",
    "compress",
    "export_model",
    "fuse_adapters",
    "load_adapter",
    "load_model",
    "patch_model",
    "resume_checkpoint",
    "save_adapter",
    "save_checkpoint",
    "summary",
    "trainer_class",
    "unpatch_model",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'apt' has no attribute {name!r}")
    return getattr(importlib.import_module(f"apt.{_HOMES[name]}"), name)
