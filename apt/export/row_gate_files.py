"""Gates that depend on the example, beside an export: what no merged weight can hold."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from apt.apt_config import APTConfig
from apt.layers import adapted
from apt.methods import METHODS, ROW_GATES, DynamicSpectral, HyperNetwork, MethodConfig
from apt.surgery import patch_model, patch_state

FILE = "apt_gates.safetensors"
BUFFERS = ("U", "S", "Vh")


def has_row_gates(model: nn.Module) -> bool:
    """Whether a patched model has gates that depend on the example."""
    return METHODS[patch_state(model).config.method].per_example


def save_row_gates(model: nn.Module, folder: Path) -> dict[str, Any]:
    """Write the network and the singular directions of every adapted linear; returns what `load_row_gates` needs.

    Args:
        model: patched, `has_row_gates`.
        folder: of the export.
    """
    hyper = model.get_submodule(ROW_GATES)
    config = patch_state(model).config
    tensors = {f"{ROW_GATES}.{name}": tensor for name, tensor in hyper.state_dict().items()}
    for name, linear in adapted(model):
        if isinstance(linear.delta, DynamicSpectral):
            tensors |= {f"{name}.{key}": getattr(linear.delta, key) for key in BUFFERS}
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, folder / FILE)
    targets = config.target_modules
    return {
        "method": config.method,
        "prune": config.prunes,  # as it says which fused projections were split
        "rank": config.rank,
        "target_modules": list(targets) if isinstance(targets, tuple) else targets,
        "adapter": dataclasses.asdict(config.adapter),
    }


def load_row_gates(model: nn.Module, folder: Path, card: dict[str, Any]) -> None:
    """Patch a plain model, loaded from the same export, and give it the gates of `save_row_gates`.

    Raises:
        ValueError: the file is missing, or does not fit the model.
    """
    try:
        tensors = load_file(folder / FILE)
    except (FileNotFoundError, SafetensorError) as error:
        raise ValueError(f"load_model: {folder / FILE} cannot be read ({error}); export the model again") from None
    settings = MethodConfig(**card["adapter"])
    config = APTConfig(**{key: card[key] for key in ("method", "prune", "rank", "target_modules")}, adapter=settings)
    patch_model(model, config)
    known = {name.rpartition(".")[0] for name in tensors}
    for name, linear in adapted(model):
        if name not in known:  # its layer was empty when it was saved
            linear.drop_adapter()
            continue
        delta = linear.delta
        assert isinstance(delta, DynamicSpectral)
        for key in BUFFERS:
            setattr(delta, key, tensors[f"{name}.{key}"].to(getattr(delta, key)))
    hyper = model.get_submodule(ROW_GATES)
    assert isinstance(hyper, HyperNetwork)
    with torch.no_grad():
        for layer, kind in ((hyper.read, "read"), (hyper.open, "open")):
            weight, bias = tensors[f"{ROW_GATES}.{kind}.weight"], tensors[f"{ROW_GATES}.{kind}.bias"]
            layer.weight, layer.bias = nn.Parameter(weight.to(layer.weight)), nn.Parameter(bias.to(layer.bias))
            layer.out_features, layer.in_features = weight.shape
