"""Save and resume the controller of a run, beside what the training loop saves of model and optimizer."""

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from apt.controller import Controller, patch_state
from apt.distiller import DistillationConfig, place_transform, release
from apt.files import write_json
from apt.records import Event
from apt.surgery import apply_event

STATE, TENSORS = "apt_state.json", "apt_state.safetensors"
TABLES = ("salience", "importance", "masks", "teacher")  # of the controller's state: name -> tensor


def save_controller(controller: Controller, folder: Path) -> None:
    """Write the controller's state into a checkpoint folder: numbers and events as JSON, tensors as safetensors."""
    state = controller.state_dict()
    tensors = {f"{table}/{name}": value for table in TABLES for name, value in state.pop(table).items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, folder / TENSORS)
    write_json(folder / STATE, state)


def restore_shapes(model: nn.Module, folder: Path, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Replay the events of a checkpoint onto a freshly patched model, so that its weights and optimizer state fit.

    Where a teacher was there, the events since it was taken leave the dense weights behind the student's. The random
    state is left as it was.

    Args:
        model: patched as the run's was.
        folder: the checkpoint.
        optimizer: where it exists already: it loses the parameters that the events took away.

    Raises:
        ValueError: the folder holds no state of a controller, or another model's.
    """
    devices = [parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"][:1]
    state = _read(folder)
    distillation = state["distillation"]
    taught = distillation is not None and not distillation["over"]
    with torch.random.fork_rng(devices=devices):
        for number, row in enumerate(state["events"]):
            keep_tail = taught and distillation["since_event"] is not None and number >= distillation["since_event"]
            apply_event(model, Event.from_json(row), optimizer, keep_tail=keep_tail)
    if taught:
        place_transform(model, DistillationConfig(transform_rank=distillation["transform_rank"]))
    else:
        release(model)
    patch_state(model).distilled = distillation is not None and distillation["over"]


def load_controller(controller: Controller, folder: Path) -> None:
    """Give a new controller the state that `save_controller` wrote; the model has the shapes of that step already."""
    state = _read(folder)
    device = next(controller.model.parameters()).device
    tables: dict[str, dict[str, Tensor]] = {table: {} for table in TABLES}
    for key, tensor in load_file(folder / TENSORS).items():
        table, _, name = key.partition("/")
        tables[table][name] = tensor.to(device)
    controller.load_state_dict({**state, **tables})


class RandomState:
    """The random state of Python, NumPy and torch (CPU and the current GPU) at the moment it was made."""

    def __init__(self) -> None:
        self._python, self._numpy, self._torch = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
        self._cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None

    def restore(self) -> None:
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.random.set_rng_state(self._torch)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda)


@contextmanager
def random_state_kept() -> Iterator[None]:
    """What runs inside leaves the random state as it found it."""
    state = RandomState()
    try:
        yield
    finally:
        state.restore()


def _read(folder: Path) -> dict[str, Any]:
    path = folder / STATE
    if not path.exists():
        raise ValueError(f"checkpoint: {folder} holds no {STATE}; it was not written by APTrainer")
    state = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(state, dict)
    return state
