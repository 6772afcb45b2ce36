"""The folder of a run: where it grows, when it gets its name, and what ``--resume`` finds there."""

import shutil
import sys
from pathlib import Path

from apt import files
from apt.runs.config import RunConfig, load_config

CONFIG = "config.yaml"
METRICS = "metrics.json"
EFFICIENCY = "efficiency.json"
EVENTS = "events.jsonl"
TIMINGS = "event_timing.json"
MODEL = "model"
CHECKPOINTS = "checkpoints"
SHAPES_A_RUN = ("model", "data", "training", "pruning", "adapter", "prompt", "tuning", "distillation")  # of the config
FREE_ON_RESUME = ("training.save_steps", "training.logging_steps", "training.report_to", "data.cache")


def partial_of(output: Path) -> Path:
    """Where a run is written until it is whole.

    Raises:
        ValueError: the path names no folder.
    """
    if not output.name:
        raise ValueError(f"train: output_dir must name a folder, got {str(output)!r}")
    return files.partial_of(output)


def is_done(output: Path, config: RunConfig, *, overwrite: bool, resume: bool) -> bool:
    """Whether nothing is left to do, because ``--resume`` meets a finished run; says so, and changes nothing.

    Raises:
        ValueError: the folder holds a finished run that may not be replaced, or something that is no run.
    """
    finished = (output / METRICS).exists()
    if finished and resume and not overwrite:
        print(f"apt: {output} holds a finished run; there is nothing to resume", file=sys.stderr)
        if (other := other_settings(output, config)) is not None:
            print(f"apt: it was made with other settings ({other}); give another output_dir for these", file=sys.stderr)
        if _checkpoints(partial_of(output)):
            print("apt: an unfinished run would replace it; --resume --overwrite goes on with that", file=sys.stderr)
        return True
    if finished and not overwrite:
        raise ValueError(f"train: {output} holds a finished run; give --overwrite to replace it, or another output_dir")
    if output.exists() and not finished and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"train: {output} exists and is no run; it stays as it is, give another output_dir")
    return False


def other_settings(output: Path, config: RunConfig) -> str | None:
    """The first setting that shapes a run and is another in a finished one, in words; None: there is none."""
    return _difference(output / CONFIG, config, "the finished run")


def is_whole(partial: Path, config: RunConfig, *, resume: bool) -> bool:
    """Whether the run only waits for its name: it was stopped between its last file and that."""
    if not resume or not (partial / METRICS).exists():
        return False
    _check_same_run(partial, config)
    return True


def find_checkpoint(partial: Path, config: RunConfig, *, overwrite: bool, resume: bool) -> str | None:
    """The checkpoint to go on from, None for a fresh start; ValueError where that would cost a checkpoint unasked."""
    found = _checkpoints(partial)
    if found and resume:
        _check_same_run(partial, config)
        return str(found[-1])
    if found and not overwrite:
        raise ValueError(
            f"train: {partial} holds {found[-1].name} of an unfinished run; give --resume to go on, or --overwrite to "
            f"start anew"
        )
    return None


def begin_folder(partial: Path, config: RunConfig) -> None:
    """An empty folder with the settings in it; what was there is gone."""
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / CONFIG).write_text(config.to_yaml(), encoding="utf-8")


def publish_run(partial: Path, output: Path) -> None:
    """Rename a complete run; an older one of the name is moved aside first and removed last."""
    shutil.rmtree(partial / CHECKPOINTS, ignore_errors=True)
    if output.exists() and not (output / METRICS).exists():
        output.rmdir()  # raises where something that is no run was put there meanwhile
    files.publish_folder(partial, output)


def _checkpoints(partial: Path) -> list[Path]:
    """Complete checkpoints, oldest first; what a kill left half written has no such name."""
    found = partial.glob(f"{CHECKPOINTS}/checkpoint-*")
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def _check_same_run(partial: Path, config: RunConfig) -> None:
    """A checkpoint goes on with the settings it was made with: optimizer and schedule come from it anyway."""
    other = _difference(partial / CONFIG, config, "the unfinished run")
    if other is not None:
        raise ValueError(f"train: {other}; --resume with the same settings, or --overwrite to start anew")


def _difference(path: Path, config: RunConfig, which: str) -> str | None:
    """The first setting that shapes a run and is another in the file of that one, in words."""
    try:
        before = load_config(path)
    except ValueError as error:
        return f"{path.name} cannot be read: {error}"
    for section in SHAPES_A_RUN:
        ours = vars(getattr(config, section))
        theirs = vars(getattr(before, section))
        for key in ours:
            if ours[key] != theirs[key] and f"{section}.{key}" not in FREE_ON_RESUME:
                return f"{section}.{key} is {ours[key]!r}, but {which} has {theirs[key]!r}"
    if config.hardware.precision != before.hardware.precision:
        return f"hardware.precision is {config.hardware.precision!r}, but {which} has {before.hardware.precision!r}"
    return None
