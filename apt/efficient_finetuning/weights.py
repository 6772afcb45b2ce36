"""What was trained, in one safetensors file, and back into a model that was prepared in the same way."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from apt.files.reading import CONTENT, UnreadableError, check_numbers, content_of, parse_json, read_tensors
from apt.files.whole import write_file_aside

SAMPLES = 8  # entries of each frozen tensor that the file keeps, to tell its model from another
BASE = "base::"  # before the names of these
FRACTIONS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # what a trained tensor may be stored in
NARROW = 2.0**-7  # relative distance of a number and its bfloat16 form


def save_weights(model: nn.Module, path: str | Path) -> Path:
    """Write every trainable parameter to a safetensors file, whatever the suffix, and what tells the model from others.

    It is written under a temporary name, then renamed.

    Raises:
        ValueError: nothing trains.
    """
    path = Path(path)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise ValueError("save_efficient_weights: nothing in this model trains; apply a method first")
    tensors = {name: p.detach().cpu().contiguous() for name, p in trained.items()} | _samples(model)
    shapes = {name: list(p.shape) for name, p in model.named_parameters() if not p.requires_grad}
    with write_file_aside(path) as partial:
        told = {"format": "pt", "frozen": json.dumps(shapes), CONTENT: content_of(tensors)}
        save_file(tensors, partial, metadata=told)
    return path


@torch.no_grad()
def load_weights(model: nn.Module, path: str | Path) -> None:
    """Read them back. Everything is compared before anything is changed.

    Raises:
        ValueError: the file is no safetensors file, or of another model; the first difference is named.
    """
    path = Path(path)
    place = f"load_efficient_weights: {path}"
    try:
        tensors, metadata = read_tensors(path, "load_efficient_weights")
    except UnreadableError as error:
        raise ValueError(f"{error}; files that would have to be unpickled are not read") from None
    if "frozen" not in metadata:
        raise ValueError(f"{place} was not written by save_efficient_weights")
    if CONTENT in metadata and metadata[CONTENT] != content_of(tensors):
        raise ValueError(f"{place} is corrupt (its checksum differs); copy or save it again")
    shapes = parse_json(metadata["frozen"], f"{place}: its list of frozen tensors")
    if not isinstance(shapes, dict):
        raise UnreadableError(f"{place} is corrupt (its list of frozen tensors is none); copy or save it again")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    stored = {name: list(t.shape) for name, t in tensors.items() if not name.startswith(BASE)}
    reason = _first_difference(shapes, _shapes(frozen), "frozen")
    reason = reason or _first_difference(stored, _shapes(trained), "trained")
    reason = reason or next((why for n, p in frozen.items() if (why := _other_numbers(n, p, tensors))), None)
    if reason is not None:
        raise ValueError(f"load_efficient_weights: {path} holds weights of another model: {reason}")
    for name, parameter in trained.items():
        if tensors[name].dtype not in FRACTIONS and tensors[name].dtype != parameter.dtype:
            raise ValueError(f"{place} is corrupt ({name} holds {tensors[name].dtype}); copy or save it again")
    check_numbers({name: tensors[name] for name in trained}, place)
    for name, parameter in trained.items():
        parameter.copy_(tensors[name])


def _shapes(parameters: dict[str, nn.Parameter]) -> dict[str, list[int]]:
    return {name: list(p.shape) for name, p in parameters.items()}


def _first_difference(stored: dict[str, list[int]], here: dict[str, list[int]], kind: str) -> str | None:
    for name in [*stored, *here]:
        if name not in here:
            return f"{name}, {kind} there, is not {kind} in this model"
        if name not in stored:
            return f"{name}, {kind} in this model, is not {kind} there"
        if stored[name] != here[name]:
            return f"{name} is {stored[name]} there and {here[name]} here"
    return None


def _samples(model: nn.Module) -> dict[str, Tensor]:
    frozen = ((name, p) for name, p in model.named_parameters() if not p.requires_grad and p.numel())
    return {BASE + name: _spread(parameter) for name, parameter in frozen}


def _spread(parameter: Tensor) -> Tensor:
    """A few entries, evenly spread."""
    places = torch.arange(SAMPLES) * (parameter.numel() - 1) // (SAMPLES - 1)
    return parameter.detach().flatten()[places.to(parameter.device)].cpu().contiguous()


def _other_numbers(name: str, parameter: Tensor, tensors: dict[str, Tensor]) -> str | None:
    if not parameter.numel():
        return None
    there = tensors.get(BASE + name)
    if there is None:
        return f"no numbers of the frozen {name} are there"
    here = _spread(parameter)
    same = torch.equal(there, here)
    if there.dtype != here.dtype:  # a model in another precision is the same model
        same = torch.allclose(there.double(), here.double(), rtol=NARROW, atol=1e-6)
    return None if same else f"the frozen {name} has other numbers"
