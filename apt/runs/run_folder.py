"""The folder of a run: where it grows, when it gets its name, and what ``--resume`` finds there."""

import shutil
from contextlib import suppress
from pathlib import Path

from apt.files.telling import tell
from apt.files.whole import MARK, check_ours, discard, mark, publish_folder, remove_ours, replaced_of, write_text
from apt.files.whole import partial_of as aside_of
from apt.runs.config import RunConfig, load_config
from apt.runs.lock import LOCK
from apt.training.whole_checkpoints import checkpoints_in

CONFIG = "config.yaml"
METRICS = "metrics.json"
EFFICIENCY = "efficiency.json"
EVENTS = "events.jsonl"
TIMINGS = "event_timing.json"
MODEL = "model"
CHECKPOINTS = "checkpoints"
NAMES = (CONFIG, METRICS, EFFICIENCY, EVENTS, TIMINGS, MODEL, CHECKPOINTS)  # of what a run writes
MORE_NAMES = ("steps.jsonl", "shapes.jsonl", "tensorboard", "report", "report.html", LOCK, MARK)
SHAPES_A_RUN = ("model", "data", "training", "pruning", "adapter", "prompt", "tuning", "distillation")  # of the config
FREE_ON_RESUME = ("training.save_steps", "training.logging_steps", "training.report_to", "data.cache")


def partial_of(output: Path) -> Path:
    """Where a run is written until it is whole.

    Raises:
        ValueError: the path names no folder.
    """
    if not output.name:
        raise ValueError(f"train: output_dir must name a folder, got {str(output)!r}")
    return aside_of(output)


def is_done(output: Path, config: RunConfig, *, overwrite: bool, resume: bool) -> bool:
    """Whether nothing is left to do, because ``--resume`` meets a finished run; says so, and changes nothing.

    Raises:
        ValueError: the folder holds a finished run that may not be replaced, or something that is no run.
    """
    finished = (output / METRICS).exists()
    if finished and resume and not overwrite:
        tell(f"{output} holds a finished run; there is nothing to resume")
        if (other := other_settings(output, config)) is not None:
            tell(f"it was made with other settings ({other}); give another output_dir for these")
        if _checkpoints(partial_of(output)) or (partial_of(output) / METRICS).exists():
            tell("an unfinished run would replace it; --resume --overwrite goes on with that")
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
    if (partial / METRICS).exists() and not overwrite:
        raise ValueError(
            f"train: {partial} holds a run that is whole and was stopped before it got its name; give --resume to "
            f"name it, or --overwrite to start anew"
        )
    return None


def check_folders(output: Path) -> None:
    """Refuse to run where a name that the run needs belongs to something else; it stays.

    Raises:
        ValueError: names it.
    """
    for folder in (partial_of(output), replaced_of(output)):
        if _is_old_run(folder):
            mark(folder)
        check_ours(folder)


def _is_old_run(folder: Path) -> bool:
    """Whether a folder without our mark is a run that an older version left there: it holds nothing else."""
    if folder.is_symlink() or not (folder / CONFIG).is_file():
        return False
    names = {path.name.removesuffix(".partial").removesuffix(".replaced") for path in folder.iterdir()}
    return names <= {*NAMES, *MORE_NAMES}


def begin_folder(partial: Path, config: RunConfig) -> None:
    """Empty the folder of an unfinished run, but for its mark and its lock, and put the settings in it.

    First goes what ``--resume`` would go on from, then what marks a run as whole: a kill meanwhile leaves neither to a
    folder that lacks the rest.
    """
    mark(partial)
    discard(partial / CHECKPOINTS)
    (partial / METRICS).unlink(missing_ok=True)
    for path in partial.iterdir():
        if path.name in (MARK, LOCK):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    write_text(partial / CONFIG, config.to_yaml())


def publish_run(partial: Path, output: Path) -> None:
    """Rename a complete run; an older one of the name is moved aside first and removed last."""
    discard(partial / CHECKPOINTS)
    if output.exists() and not (output / METRICS).exists():
        output.rmdir()  # raises where something that is no run was put there meanwhile
    publish_folder(partial, output)
    tidy_named(output)


def tidy_named(output: Path) -> None:
    """Remove what a kill leaves beside a run that has its name: lock and mark, and the run that had it before."""
    for name in (LOCK, MARK):
        with suppress(OSError):
            (output / name).unlink(missing_ok=True)
    remove_ours(replaced_of(output))


def _checkpoints(partial: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return checkpoints_in(partial / CHECKPOINTS)


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
