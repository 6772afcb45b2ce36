"""A `transformers.Trainer` that shows a checkpoint under its name only when all of it is on the disk, and knows it.

What it resumes from is checked first: every file against the list that was written last, and the step that each tells.
"""

import json
import os
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

from apt.files.manifest import MANIFEST, check_manifest, write_manifest
from apt.files.reading import UnreadableError, check_numbers, read_json_table, read_tensors
from apt.files.whole import MARK, is_ours, mark, publish_folder, remove_ours
from apt.training.checkpoint import ADVICE, STATE, read_state

PARTIAL = "checkpoint.partial"  # where a checkpoint is written before it gets its name
NAME = re.compile(r"checkpoint-(\d+)")
TRAINER_STATE = "trainer_state.json"
WEIGHTS = "model.safetensors"
NEEDED = ("optimizer.pt", "scheduler.pt", "rng_state*.pth")  # beside the weights; the Trainer goes on without a word
# What torch.load and the Trainer raise for a file that is cut or altered.
CORRUPT = (
    *(EOFError, pickle.UnpicklingError, RuntimeError, LookupError, TypeError, AttributeError, OSError),
    *(json.JSONDecodeError, UnicodeDecodeError),
)


def checkpoints_in(folder: Path) -> list[Path]:
    """Complete checkpoints, by step; what a kill left half written has no such name, nor has a folder of the user."""
    found = [path for path in folder.glob("checkpoint-*") if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def check_checkpoint(folder: Path, *, weights_only: bool = False) -> None:
    """Refuse a checkpoint of a Trainer that is not what was written; nothing has been changed then.

    Args:
        folder: of the checkpoint.
        weights_only: it was written without optimizer, schedule and random state.

    Raises:
        ValueError: a file is missing, altered, or of another step; it is named.
    """
    if not (folder / STATE).exists() and not (folder / MANIFEST).exists():
        raise ValueError(f"checkpoint: {folder} holds no {STATE}; it was not written by APTrainer")
    if not (folder / TRAINER_STATE).exists():
        raise ValueError(f"checkpoint: {folder} holds no {TRAINER_STATE}; it is no checkpoint of a Trainer")
    listed = check_manifest(folder, "checkpoint")
    if not listed and not weights_only:
        missing = [name for name in NEEDED if not any(folder.glob(name))]
        if missing:
            raise UnreadableError(f"checkpoint: {folder / missing[0]} is missing; {ADVICE}")
    step = read_json_table(folder / TRAINER_STATE, "checkpoint").get("global_step")
    told = read_state(folder)["step"]
    named = NAME.fullmatch(folder.name)
    if told != step or (named is not None and int(named[1]) != step):
        raise UnreadableError(
            f"checkpoint: the files of {folder} are not of one step: {STATE} tells {told}, {TRAINER_STATE} {step}; "
            f"{ADVICE}"
        )


class WholeCheckpoints(Trainer):
    """Writes checkpoints under a temporary name, then renames them: a kill meanwhile loses none that is there."""

    _staging: Path | None = None  # stands in for the output folder while a checkpoint is written

    def train(
        self, resume_from_checkpoint: str | os.PathLike[str] | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Train, from a checkpoint that was checked, or from the start."""
        if resume_from_checkpoint is True:
            name_again(Path(self._get_output_dir(None)))
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir) or True
        if isinstance(resume_from_checkpoint, str | os.PathLike):
            resume_from_checkpoint = os.fspath(resume_from_checkpoint)
            check_checkpoint(Path(resume_from_checkpoint), weights_only=self.args.save_only_model)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        self._staging = folder / PARTIAL
        _remove_staging(self._staging)
        mark(self._staging)
        try:
            super()._save_checkpoint(model, trial)
            written = self._staging / name
            best = self.state.best_model_checkpoint
            if best is not None and Path(best) == written:  # also in the state that is saved
                self.state.best_model_checkpoint = str(folder / name)
                self.state.save_to_json(str(written / TRAINER_STATE))
            write_manifest(written)
        finally:
            self._staging = None
        publish_folder(written, folder / name)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder / name))
        self._rotate(folder)
        remove_ours(folder / PARTIAL)

    def save_now(self) -> None:
        """Save a checkpoint of the step that is done, unless there is one."""
        assert self.model is not None
        folder = Path(self._get_output_dir(None)) / f"checkpoint-{self.state.global_step}"
        if not folder.exists():
            self._save_checkpoint(self.model, trial=None)

    def _rotate(self, folder: Path) -> None:
        """Take the names of the checkpoints of the lowest steps, as many as are too many; clocks have no say.

        They go to what was written aside, and with it: a kill leaves no half of a checkpoint under its name.
        """
        limit = self.args.save_total_limit
        if limit is None or limit <= 0:
            return
        found = checkpoints_in(folder)
        best = self.state.best_model_checkpoint
        kept = {found[-1], *([] if best is None else [Path(best)])}
        spare = [path for path in found if path not in kept and (path / TRAINER_STATE).exists()]
        for path in spare[: max(0, len(found) - max(limit, len(kept)))]:
            with suppress(OSError):
                os.rename(path, folder / PARTIAL / path.name)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is None:  # else its name is still to come
            super()._push_from_checkpoint(checkpoint_folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load the weights: all that a checkpoint must have, and nothing else."""
        path = Path(resume_from_checkpoint) / WEIGHTS
        plain = self.model
        if path.exists() and plain is not None:
            _check_weights(path, plain)
        with _reading(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _reading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _reading(checkpoint):
            super()._load_rng_state(checkpoint)


def name_again(folder: Path) -> None:
    """Give a checkpoint its name back that waits in vain for the one that was to replace it."""
    for path in (folder / PARTIAL).glob("checkpoint-*.replaced"):
        whole = folder / path.name.removesuffix(".replaced")
        if NAME.fullmatch(whole.name) and not os.path.lexists(whole):
            os.rename(path, whole)
            (whole / MARK).unlink(missing_ok=True)


def _remove_staging(staging: Path) -> None:
    """Remove what a kill left of the last save; an older version did not mark it, but nobody else names it so."""
    name_again(staging.parent)
    if staging.is_dir() and not staging.is_symlink():
        names = [path.name for path in staging.iterdir()]
        if not is_ours(staging) and all(NAME.fullmatch(name) for name in names):
            (staging / MARK).touch()
    remove_ours(staging)


def _check_weights(path: Path, model: nn.Module) -> None:
    """Whether a file has every trained parameter in its shape, and numbers only: the Trainer takes what it finds."""
    tensors, _ = read_tensors(path, "checkpoint")
    names: dict[int, list[str]] = {}  # a tied parameter has several, and the file one of them
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for name, parameter in model.named_parameters():
        stored = next((tensors[other] for other in names[id(parameter)] if other in tensors), None)
        if stored is None and parameter.requires_grad:
            raise UnreadableError(f"checkpoint: {path} lacks {name}, which was trained; {ADVICE}")
        if stored is not None and stored.shape != parameter.shape:
            told = f"{list(stored.shape)} there and {list(parameter.shape)} here"
            raise ValueError(f"checkpoint: {path} does not fit the model: {name} is {told}")
    check_numbers(tensors, f"checkpoint: {path}")


@contextmanager
def _reading(checkpoint: str | None) -> Iterator[None]:
    """What goes wrong inside is said in one line with the name of the checkpoint."""
    try:
        yield
    except CORRUPT as error:
        if checkpoint is None:
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"checkpoint: {checkpoint} is corrupt ({reason:.200}); {ADVICE}") from error
