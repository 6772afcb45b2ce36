"""What must hold before a controller takes a model over: the patch fits the config, and there is one process."""

from typing import Any

import torch
from torch import nn

from apt.apt_config import APTConfig

BUILT_IN = ("method", "prune", "rank", "scale", "target_modules", "prompt")
BUILT_ADAPTER = (  # of the section `adapter`
    *("lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "lora_dropout", "num_directions", "idx"),
    *("adaptive_rank", "importance_threshold"),
    *("gate_alpha", "gate_temperature", "context", "context_layer", "hyper_params"),
)


def check_built(asked: APTConfig, built: APTConfig) -> None:
    """Raise ValueError where a config differs in what `patch_model` has built already: no controller can change that.

    Args:
        asked: the config of the controller.
        built: the one that `patch_model` stored.
    """
    for name in BUILT_IN:
        _check_setting(name, getattr(asked, name), getattr(built, name))
    for name in BUILT_ADAPTER:
        _check_setting(name, getattr(asked.adapter, name), getattr(built.adapter, name))


def _check_setting(name: str, asked: Any, built: Any) -> None:
    if asked != built:
        raise ValueError(f"controller: the model was patched with {name}={built!r}, got {asked!r}; patch it anew")


def check_one_process() -> None:
    """Raise ValueError where training runs in more than one process."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed and torch.distributed.get_world_size() > 1:
        raise ValueError("controller: this version trains in one process, whatever the method; start it on one device")


def check_holds_trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError where an optimizer holds no parameter of the model that trains: it is another model's."""
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if trained and not trained & held:
        raise ValueError(
            "controller: the optimizer holds none of the parameters of this model that train; make it after "
            "patch_model, over [p for p in model.parameters() if p.requires_grad]"
        )


def check_one_device(num_gpus: int) -> None:
    """Raise ValueError where a Trainer would spread each batch over several GPUs of this process."""
    if num_gpus > 1:
        raise ValueError(
            f"trainer: this process sees {num_gpus} GPUs, for which transformers wraps the model in DataParallel; this "
            f"version trains on one: set CUDA_VISIBLE_DEVICES=0"
        )
