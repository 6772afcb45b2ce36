"""Gates that depend on the example, beside an export: what no merged weight can hold."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from apt.apt_config import APTConfig
from apt.files.reading import UnreadableError, check_numbers, read_tensors
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
    path = folder / FILE
    try:
        tensors, _ = read_tensors(path, "load_model")
        check_numbers(tensors, f"load_model: {path}")
    except (FileNotFoundError, UnreadableError) as error:
        raise ValueError(f"{error}; export the model again") from None
    try:
        settings = MethodConfig(**card["adapter"])
        named = {key: card[key] for key in ("method", "prune", "rank", "target_modules")}
        patch_model(model, APTConfig(**named, adapter=settings))
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise ValueError(
            f"load_model: the card of {folder} is corrupt (gates: {error}); export the model again"
        ) from None
    known = {name.rpartition(".")[0] for name in tensors}
    for name, linear in adapted(model):
        if name not in known:  # its layer was empty when it was saved
            linear.drop_adapter()
            continue
        delta = linear.delta
        if not isinstance(delta, DynamicSpectral):
            raise ValueError(
                f"load_model: {path} has gates for {name}, where the model has none; export the model again"
            )
        found = {key: _tensor(path, tensors, f"{name}.{key}") for key in BUFFERS}
        count = found["S"].numel()
        wanted = {"U": (linear.n_out, count), "S": (count,), "Vh": (count, linear.n_in)}
        for key, tensor in found.items():
            _check_shape(path, f"{name}.{key}", tensor, wanted[key])
            setattr(delta, key, tensor.to(getattr(delta, key)))
    hyper = model.get_submodule(ROW_GATES)
    assert isinstance(hyper, HyperNetwork)
    width = hyper.read.in_features
    with torch.no_grad():
        for layer, kind in ((hyper.read, "read"), (hyper.open, "open")):
            weight, bias = (_tensor(path, tensors, f"{ROW_GATES}.{kind}.{part}") for part in ("weight", "bias"))
            _check_shape(path, f"{ROW_GATES}.{kind}.weight", weight, (len(bias), width))
            width = len(bias)
            layer.weight, layer.bias = nn.Parameter(weight.to(layer.weight)), nn.Parameter(bias.to(layer.bias))
            layer.out_features, layer.in_features = weight.shape


def _tensor(path: Path, tensors: dict[str, Tensor], name: str) -> Tensor:
    """A tensor of the file of gates; ValueError where it is not there, or holds no fractions."""
    if name not in tensors or not tensors[name].is_floating_point():
        raise ValueError(f"load_model: {path} is corrupt ({name} is missing, or no fractions); export the model again")
    return tensors[name]


def _check_shape(path: Path, name: str, tensor: Tensor, wanted: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != wanted:
        told = f"{name} is {list(tensor.shape)}, and the model has {list(wanted)}"
        raise ValueError(f"load_model: {path} does not fit the model: {told}; export the model again")
