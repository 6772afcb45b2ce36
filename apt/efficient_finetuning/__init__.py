"""The classes and helpers of the efficient fine-tuning document: a facade over `apt.patch_model` and its rooms."""

from typing import Any

from torch import nn

from apt.efficient_finetuning.layers import AdaLoRALayer, LoRALayer, LoRALinear
from apt.efficient_finetuning.manager import EfficientFineTuningManager
from apt.methods.prompts import PrefixTuning, PTuningEmbedding

__all__ = [
    "AdaLoRALayer",
    "EfficientFineTuningManager",
    "LoRALayer",
    "LoRALinear",
    "PTuningEmbedding",
    "PrefixTuning",
    "apply_adalora_to_model",
    "apply_lora_to_model",
    "apply_prefix_tuning_to_model",
    "apply_ptuning_to_model",
]


def apply_lora_to_model(model: nn.Module, *arguments: Any, **settings: Any) -> EfficientFineTuningManager:
    """A manager of the model, after `EfficientFineTuningManager.apply_lora` with these arguments."""
    manager = EfficientFineTuningManager(model)
    manager.apply_lora(*arguments, **settings)
    return manager


def apply_ptuning_to_model(model: nn.Module, *arguments: Any, **settings: Any) -> EfficientFineTuningManager:
    """A manager of the model, after `EfficientFineTuningManager.apply_ptuning` with these arguments."""
    manager = EfficientFineTuningManager(model)
    manager.apply_ptuning(*arguments, **settings)
    return manager


def apply_adalora_to_model(model: nn.Module, *arguments: Any, **settings: Any) -> EfficientFineTuningManager:
    """A manager of the model, after `EfficientFineTuningManager.apply_adalora` with these arguments."""
    manager = EfficientFineTuningManager(model)
    manager.apply_adalora(*arguments, **settings)
    return manager


def apply_prefix_tuning_to_model(model: nn.Module, *arguments: Any, **settings: Any) -> EfficientFineTuningManager:
    """A manager of the model, after `EfficientFineTuningManager.apply_prefix_tuning` with these arguments."""
    manager = EfficientFineTuningManager(model)
    manager.apply_prefix_tuning(*arguments, **settings)
    return manager
