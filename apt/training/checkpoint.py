"""Save and resume a run: the controller alone, beside what a Trainer saves, or all that a loop of one's own needs."""

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from apt.distillation import DistillationConfig, place_transform, release
from apt.families.config_files import state_reason_of
from apt.files.manifest import check_manifest, sha256_of
from apt.files.reading import UnreadableError, check_numbers, check_regular, read_json_table, read_tensors
from apt.files.whole import find_whole, write_folder_aside, write_json, write_jsonl
from apt.records import Event
from apt.surgery import bare_model, patch_state
from apt.surgery.event import apply_event
from apt.surgery.moments import bare_optimizer
from apt.training.controller import Controller

STATE = "apt_state.json"
TENSORS = "apt_state.safetensors"
RUN, MODEL, OPTIMIZER = "apt_run.json", "model.safetensors", "optimizer.safetensors"  # of a loop of one's own
TENSOR = "tensor"  # stands in JSON for a tensor, beside its name in a safetensors file
TABLES = ("salience", "importance", "masks", "teacher")  # of the controller's state: name -> tensor
SUM = "tensors_sha256"  # in the first file, of the second: a save that was stopped between the two is seen
ADVICE = "take an older checkpoint, or start anew"


def save_checkpoint(controller: Controller, folder: str | Path) -> Path:
    """Save a run of your own loop: controller, model, optimizer, gradient scaler and random states.

    Call it between two steps, after ``after_step`` and ``zero_grad``. What it cannot know is yours to keep: the place
    in the data (``controller.step`` says how many optimizer steps are done) and a schedule of the learning rate.

    Args:
        controller: of the run.
        folder: written under a temporary name, then renamed; an older checkpoint of that name is replaced.

    Returns:
        The folder.

    Raises:
        ValueError: the folder holds something that is no such checkpoint.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / RUN).exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"checkpoint: {folder} exists and is no checkpoint of a loop; it stays, give another folder")
    tensors: dict[str, Tensor] = {}
    run = {
        "total_steps": controller.total_steps,
        "optimizer": _take_tensors(controller.optimizer.state_dict(), "", tensors),
        "scaler": None if controller.scaler is None else controller.scaler.state_dict(),
        "random": RandomState().to_json(),
    }
    with write_folder_aside(folder, holds=RUN) as partial:
        save_controller(controller, partial)
        # Copies, as names may share memory, which a safetensors file cannot say.
        weights = controller.model.state_dict().items()
        plain = {"copy": True, "memory_format": torch.contiguous_format}
        save_file({name: tensor.to("cpu", **plain) for name, tensor in weights}, partial / MODEL)
        save_file(tensors, partial / OPTIMIZER)
        (partial / RUN).write_text(json.dumps(run), encoding="utf-8")
    return folder


def resume_checkpoint(
    folder: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer, **settings: Any
) -> Controller:
    """Take a run of your own loop up where `save_checkpoint` left it.

    Make model and optimizer as the run did: load the pretrained model, patch it with the same settings, give the
    optimizer its trainable parameters. They get the shapes, the numbers and the moments of the checkpoint, and the
    random states of this process become those of that moment.

    Args:
        folder: as `save_checkpoint` wrote it.
        model: patched anew.
        optimizer: over the model's trainable parameters, of the class that the run had.
        settings: what `Controller` was given beside model, optimizer and ``total_steps``, which is that of the run. A
            scaler gets its state back, an event log the events until then.

    Returns:
        The controller, which goes on with the next step.

    Raises:
        ValueError: the folder holds no such checkpoint, or one of a model that was patched in another way.
    """
    folder = find_whole(Path(folder))
    plain = bare_model(model)
    if not (folder / RUN).exists():
        raise ValueError(f"checkpoint: {folder} holds no {RUN}; it was not written by apt.save_checkpoint")
    check_manifest(folder, "checkpoint")
    run = _read_run(folder)
    weights, _ = read_tensors(folder / MODEL, "checkpoint")
    moments, _ = read_tensors(folder / OPTIMIZER, "checkpoint")
    check_numbers(weights, f"checkpoint: {folder / MODEL}")
    check_numbers(moments, f"checkpoint: {folder / OPTIMIZER}")
    random_state = _read_random(folder, run)
    restore_shapes(plain, folder, bare_optimizer(optimizer))
    try:
        plain.load_state_dict(weights)
    except RuntimeError as error:
        reason = state_reason_of(error)
        raise ValueError(
            f"checkpoint: {folder / MODEL} does not fit the model, patch it as the run's was: {reason}"
        ) from None
    controller = Controller(model, optimizer, run["total_steps"], **settings)
    load_controller(controller, folder)
    try:
        controller.optimizer.load_state_dict(_optimizer_state(run["optimizer"], moments))
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"checkpoint: {folder / OPTIMIZER} does not fit the optimizer: {error}; {ADVICE}") from None
    if controller.scaler is not None and run["scaler"] is not None:
        controller.scaler.load_state_dict(run["scaler"])
    if controller.event_log is not None:  # what came after the checkpoint will come again
        write_jsonl(controller.event_log, [event.to_json() for event in controller.events])
    random_state.restore()
    return controller


def _read_run(folder: Path) -> dict[str, Any]:
    """What a loop's checkpoint tells beside the controller."""
    run = read_json_table(folder / RUN, "checkpoint")
    missing = [key for key in ("total_steps", "optimizer", "scaler", "random") if key not in run]
    if missing or not isinstance(run["total_steps"], int):
        raise UnreadableError(
            f"checkpoint: {folder / RUN} is corrupt ({(missing or ['total_steps'])[0]} is off); {ADVICE}"
        )
    return run


def _read_random(folder: Path, run: dict[str, Any]) -> "RandomState":
    try:
        return RandomState.from_json(run["random"])
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        raise UnreadableError(f"checkpoint: {folder / RUN} is corrupt (random: {error}); {ADVICE}") from None


def save_controller(controller: Controller, folder: Path) -> None:
    """Write the controller's state into a checkpoint folder: numbers and events as JSON, tensors as safetensors."""
    state = controller.state_dict()
    tensors = {f"{table}/{name}": value for table in TABLES for name, value in state.pop(table).items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, folder / TENSORS)
    write_json(folder / STATE, {**state, SUM: sha256_of(folder / TENSORS)})


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
    state = read_state(folder)
    _check_fresh(model, folder, state)
    past = _read_events(folder, state, "past")  # of earlier runs, which left no teacher
    events = _read_events(folder, state, "events")
    distillation = state["distillation"]
    taught = distillation is not None and not distillation["over"]
    with torch.random.fork_rng(devices=devices):
        for event in past:
            _replay(model, event, folder, optimizer, keep_tail=False)
        for number, event in enumerate(events):
            keep_tail = taught and distillation["since_event"] is not None and number >= distillation["since_event"]
            _replay(model, event, folder, optimizer, keep_tail=keep_tail)
    if taught:
        place_transform(model, DistillationConfig(transform_rank=distillation["transform_rank"]))
    else:
        release(model)
    patched = patch_state(model)
    patched.distilled = distillation is not None and distillation["over"]
    patched.past = [*past, *events]


def _check_fresh(model: nn.Module, folder: Path, state: dict[str, Any]) -> None:
    """Raise ValueError where a model does not have its first shapes, or was patched in another way than the run's."""
    patched = patch_state(model)
    if patched.past:
        raise ValueError(
            f"checkpoint: this model has been through {len(patched.past)} events already, and {folder} is taken up "
            f"from the first shapes: load the pretrained model and patch it anew"
        )
    for name, value in state.get("built", {}).items():
        ours = patched.built[name]
        if value != ours:
            shown = f"{name}={value!r}, this one with {ours!r}"
            if name == "target_modules":
                shown = f"adapters on {_differing(value, ours)}, this one on {_differing(ours, value)}"
            raise ValueError(f"checkpoint: the model of {folder} was patched with {shown}; patch it as that run did")


def _differing(names: list[str], others: list[str]) -> str:
    """Those of the names that are not among the others, the first few."""
    left = [name for name in names if name not in others]
    return ", ".join([*left[:4], *(["..."] if len(left) > 4 else [])]) or "none of these"


def load_live(model: nn.Module, folder: Path) -> bool:
    """Load the weights of a checkpoint of this run into its model, whose shapes are those of the checkpoint or later.

    Where a teacher was there, its part of each weight lies behind the live one, and is left; so is Tr.

    Args:
        model: what the Trainer trains.
        folder: the checkpoint, from after the last event.

    Returns:
        Whether the weights lay there as one file; otherwise nothing is done.

    Raises:
        ValueError: the checkpoint is from before an event.
    """
    path = folder / MODEL
    if not path.exists():
        return False
    patched = bare_model(model)
    state = read_state(folder)
    at_save = len(state["events"]) + len(state["past"])
    if at_save != len(patch_state(patched).past):
        raise ValueError(f"checkpoint: {folder} is from before an event of the run, its weights have other shapes")
    own = model.state_dict()
    saved = {name: tensor for name, tensor in read_tensors(path, "checkpoint")[0].items() if name in own}
    live = {name: tensor[tuple(map(slice, own[name].shape))] for name, tensor in saved.items()}
    model.load_state_dict(live, strict=False)
    return True


def load_controller(controller: Controller, folder: Path) -> None:
    """Give a new controller the state that `save_controller` wrote; the model has the shapes of that step already."""
    state = read_state(folder)
    taught = state["distillation"] is not None and not state["distillation"]["over"]
    if taught and controller.distillation is None:
        raise ValueError(
            "distillation: the checkpoint is of a run with a teacher; resume with use_self_distillation=True, as it was"
        )
    device = next(controller.model.parameters()).device
    tables: dict[str, dict[str, Tensor]] = {table: {} for table in TABLES}
    place = f"checkpoint: {folder / TENSORS}"
    tensors, _ = read_tensors(folder / TENSORS, "checkpoint")
    check_numbers(tensors, place)
    for key, tensor in tensors.items():
        table, _, name = key.partition("/")
        if table not in tables:
            raise UnreadableError(f"{place} is corrupt ({key!r:.60} is none of ours); {ADVICE}")
        tables[table][name] = tensor.to(device)
    try:
        controller.load_state_dict({**state, **tables})
    except (LookupError, TypeError, AttributeError, RuntimeError, AssertionError) as error:
        raise UnreadableError(
            f"checkpoint: {folder / STATE} does not fit this run ({error!r:.120}); {ADVICE}"
        ) from None


class RandomState:
    """The random state of Python, NumPy and torch (CPU and the current GPU) at the moment it was made."""

    def __init__(self) -> None:
        self._python = random.getstate()
        self._numpy: Any = np.random.get_state()
        self._torch = torch.random.get_rng_state()
        self._cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None

    def to_json(self) -> dict[str, Any]:
        """All of it as lists of numbers."""
        kind, keys, *rest = self._numpy
        return {
            "python": self._python,
            "numpy": [kind, keys.tolist(), *rest],
            "torch": self._torch.tolist(),
            "cuda": None if self._cuda is None else self._cuda.tolist(),
        }

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> "RandomState":
        """The state that `to_json` told; that of a GPU stays as it is where it was not told."""
        state = cls()
        version, internal, gauss = row["python"]
        state._python = (version, tuple(internal), gauss)
        state._numpy = tuple(row["numpy"])
        state._torch = torch.tensor(row["torch"], dtype=torch.uint8)
        if row["cuda"] is not None and torch.cuda.is_available():
            state._cuda = torch.tensor(row["cuda"], dtype=torch.uint8)
        # Taken by generators of nobody: what is no state raises here, and not when half of them are restored.
        random.Random().setstate(state._python)
        np.random.RandomState().set_state(state._numpy)
        torch.Generator().set_state(state._torch)
        return state

    def restore(self) -> None:
        """Make it the random state of this process."""
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


def read_state(folder: Path) -> dict[str, Any]:
    """What the controller was, but for its tensors.

    Raises:
        ValueError: the folder holds no such state, or one whose files are not of one moment.
    """
    path = folder / STATE
    if not path.exists():
        raise ValueError(f"checkpoint: {folder} holds no {STATE}; it was not written by APTrainer")
    state = read_json_table(path, "checkpoint")
    distillation = state.get("distillation")
    if not isinstance(state.get("step"), int) or not isinstance(distillation, dict | None):
        raise UnreadableError(f"checkpoint: {path} is corrupt (step or distillation is off); {ADVICE}")
    if not (folder / TENSORS).exists():
        raise UnreadableError(f"checkpoint: {folder / TENSORS} is missing; {ADVICE}")
    check_regular(folder / TENSORS, "checkpoint")
    if SUM in state and state[SUM] != sha256_of(folder / TENSORS):
        raise UnreadableError(
            f"checkpoint: {folder / TENSORS} is not of the moment of {STATE}; the save was stopped halfway, {ADVICE}"
        )
    return {"distillation": None, "past": [], **state}


def _read_events(folder: Path, state: dict[str, Any], key: str) -> list[Event]:
    try:
        return [Event.from_json(row) for row in state[key]]
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UnreadableError(f"checkpoint: {folder / STATE} is corrupt ({key}: {error!r:.80}); {ADVICE}") from None


def _replay(
    model: nn.Module, event: Event, folder: Path, optimizer: torch.optim.Optimizer | None, *, keep_tail: bool
) -> None:
    try:
        apply_event(model, event, optimizer, keep_tail=keep_tail)
    except (LookupError, TypeError, AttributeError, RuntimeError, AssertionError) as error:
        told = f"its event of step {event.step} does not fit the model: {error!r:.80}"
        raise UnreadableError(f"checkpoint: {folder / STATE} is corrupt ({told}); {ADVICE}") from error


def _take_tensors(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """The value for JSON, with each tensor in it moved to `tensors` under the path that leads there."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().contiguous()
        return {TENSOR: name}
    if isinstance(value, dict):
        return {key: _take_tensors(inner, f"{name}/{key}", tensors) for key, inner in value.items()}
    if isinstance(value, list):
        return [_take_tensors(inner, f"{name}/{index}", tensors) for index, inner in enumerate(value)]
    return value


def _put_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    """What `_take_tensors` was given, but that keys are texts and tuples are lists."""
    if isinstance(value, dict):
        if value.keys() == {TENSOR}:
            return tensors[value[TENSOR]]
        return {key: _put_tensors(inner, tensors) for key, inner in value.items()}
    if isinstance(value, list):
        return [_put_tensors(inner, tensors) for inner in value]
    return value


def _optimizer_state(saved: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """An optimizer's state as its `state_dict` had it: parameters by number, settings like ``betas`` as tuples."""
    state: dict[str, Any] = _put_tensors(saved, tensors)
    state["state"] = {int(number): moments for number, moments in state["state"].items()}
    for group in state["param_groups"]:
        lists = [key for key, value in group.items() if isinstance(value, list) and key != "params"]
        group.update({key: tuple(group[key]) for key in lists})
    return state
