"""What `kills.py` kills: a run of the command, and a loop of one's own. Each can be begun, taken up, and checked."""

import hashlib
import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from killable import during
from tiny_run import tiny_bert

import apt
from apt import cli
from apt.files import whole
from apt.files.manifest import check_manifest
from apt.files.whole import MARK, find_whole, partial_of, read_jsonl
from apt.runs import measure, run, run_folder
from apt.runs.data import cache
from apt.training import whole_checkpoints
from apt.training.controller import Controller, controller
from apt.training.whole_checkpoints import WholeCheckpoints, check_checkpoint, checkpoints_in

STEPS, SAVE_EVERY = 24, 4
PRUNING = {"target_sparsity": 0.5, "num_events": 3, "prune_end": 0.8}
TAUGHT = {"use_self_distillation": True, "distill_end": 0.9}
SETTINGS: dict[str, dict[str, Any]] = {
    "training": {"max_steps": STEPS, "save_steps": SAVE_EVERY, "logging_steps": 3},
    "pruning": PRUNING,
    "distillation": TAUGHT,
    "evaluation": {"event_timing_steps": 1, "inference_repeats": 1},
}
SAVED = "saved.jsonl"  # of a trial: the step and the checksums of each checkpoint that was written
SUMMED = ("model.safetensors", "optimizer.*", "apt_state.safetensors")


class Life(Protocol):
    """A run that may be killed at any moment."""

    name: str

    def prepare(self, folder: Path) -> None:
        """What lies in the folder of a trial before the run begins."""

    def live(self, folder: Path, *, again: bool) -> int:
        """The run, in a process of its own, or what a user does after a kill; the exit code."""

    def lost(self, folder: Path) -> list[str]:
        """What should be there after a kill, and is not: a line each."""

    def result(self, folder: Path) -> dict[str, Any]:
        """What must be as in a run that was left alone."""


def watch() -> None:
    """In the process of a run: tell each phase as it begins, and the checksums of each checkpoint when it has its name.

    The tokens of so little data are not kept by themselves; here they are, as that writes a file too.
    """
    cache.SLOW = 0
    during(run, "_train_model", "training")
    during(Controller, "loss", "training")
    during(controller, "apply_plan", "event")
    during(WholeCheckpoints, "_save_checkpoint", "checkpoint")
    during(apt, "save_checkpoint", "checkpoint")
    during(run, "measure_run", "measuring")
    for owner in (measure, apt):
        during(owner, "export_model", "export")
    for room in (whole, whole_checkpoints, run_folder):
        during(room, "publish_folder", "renaming")
    during(run, "begin_folder", "emptying")
    during(run, "publish_run", "publishing")
    during(cli.COMMANDS, "report", "report")


def note(folder: Path, step: int, checkpoint: Path) -> None:
    """Keep the checksums of a checkpoint that has its name."""
    files = sorted(path for pattern in SUMMED for path in checkpoint.glob(pattern))
    row = {"step": step, "sums": {path.name: sum_of(path) for path in files}}
    with (folder / SAVED).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def sum_of(path: Path) -> str:
    """The checksum of a file; of torch's, that of what it holds: pickle writes equal texts once or several times."""
    content = path.read_bytes()
    if path.suffix == ".pt":
        content = repr(bits_of(torch.load(path, weights_only=True))).encode()
    return hashlib.sha256(content).hexdigest()


def bits_of(value: Any) -> Any:
    """A value with the bytes of each tensor in its place."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.numpy().tobytes()
    if isinstance(value, dict):
        return [(key, bits_of(inner)) for key, inner in value.items()]
    return [bits_of(inner) for inner in value] if isinstance(value, list | tuple) else value


def noted(folder: Path) -> dict[int, Any]:
    """Step -> the checksums of its checkpoint; two of one step must have the same."""
    found: dict[int, Any] = {}
    for row in read_jsonl(folder / SAVED) if (folder / SAVED).exists() else []:
        if found.setdefault(row["step"], row["sums"]) != row["sums"]:
            found[row["step"]] = "differs from itself"
    return found


def decisions(path: Path) -> list[Any]:
    return [(row["step"], row["prune"], row["rank"]) for row in read_jsonl(path)]


class CommandLife:
    """``python -m apt train``, then ``report``; a kill is answered by the same command with ``--resume``.

    Args:
        config: of the run.
        before: what lies where it writes: "fresh", nothing; a "finished" run; an "unfinished" one with a checkpoint; or
            one that is "unnamed", as it was killed just before it got its name. Each was trained from another seed.
        earlier: folder with those three.
    """

    def __init__(self, config: Path, before: str, earlier: Path) -> None:
        self.config, self.before, self.earlier = config, before, earlier
        self.name = before

    def prepare(self, folder: Path) -> None:
        if self.before != "fresh":
            shutil.copytree(self.earlier / self.before, folder, dirs_exist_ok=True)

    def live(self, folder: Path, *, again: bool) -> int:
        original = WholeCheckpoints._save_checkpoint

        def save(trainer: Any, *args: Any) -> None:
            original(trainer, *args)
            step = trainer.state.global_step
            note(folder, step, Path(trainer.args.output_dir) / f"checkpoint-{step}")

        WholeCheckpoints._save_checkpoint = save  # type: ignore[method-assign]
        command = ["train", str(self.config), f"output_dir={folder / 'run'}", f"data.cache={folder / 'tokens'}"]
        flags = [] if self.before == "fresh" else ["--overwrite"]
        if again:
            flags = ["--resume", "--overwrite"] if self.before == "finished" else ["--resume"]
        code = cli.main([*command, *flags])
        if code == 2 and again and self.before in ("unfinished", "unnamed"):
            # Killed before anything of the earlier one went: the settings differ, and the message says what to give.
            code = cli.main([*command, "--overwrite"])
        # The page is drawn slowly, so in one kind of life.
        return code or (cli.main(["report", str(folder / "run")]) if self.before == "finished" else 0)

    def lost(self, folder: Path) -> list[str]:
        complaints = []
        partial = partial_of(folder / "run")
        if partial.exists() and not (partial / run_folder.METRICS).exists():
            there = checkpoints_in(partial / run_folder.CHECKPOINTS)
            for path in there:
                try:
                    check_checkpoint(path)
                except ValueError as error:
                    complaints.append(f"{path.name} cannot be read: {error}")
            newest = max(noted(folder), default=0)
            if not any(path.name == f"checkpoint-{step}" for path in there for step in range(newest, STEPS + 1)):
                complaints += [f"checkpoint-{newest} is gone"] if newest and not self._is_named(folder) else []
        return complaints + (self._lost_earlier(folder) if self.before == "finished" else [])

    def _is_named(self, folder: Path) -> bool:
        """Whether the new run is where it belongs."""
        weights = folder / "run" / "model" / "model.safetensors"
        return weights.exists() and sum_of(weights) != sum_of(self.earlier / "finished" / "run/model/model.safetensors")

    def _lost_earlier(self, folder: Path) -> list[str]:
        if self._is_named(folder):
            return []
        model = find_quietly(folder / "run") / "model"
        same = sums_below(model) == sums_below(self.earlier / "finished" / "run/model")
        return [] if same else ["the finished run is gone"]

    def result(self, folder: Path) -> dict[str, Any]:
        done = folder / "run"
        return {
            "weights": sum_of(done / "model" / "model.safetensors"),
            "metrics": (done / "metrics.json").read_text(encoding="utf-8"),
            "events": decisions(done / "events.jsonl"),
            "files": sorted(path.name for path in done.iterdir()),
        }


class LoopLife:
    """A loop of one's own that saves into one folder, and exports onto an export that is there already."""

    name = "loop"

    def __init__(self, export: Path) -> None:
        self.export = export

    def prepare(self, folder: Path) -> None:
        shutil.copytree(self.export, folder / "export")

    def live(self, folder: Path, *, again: bool) -> int:
        warnings.simplefilter("ignore")  # of a folder that waits under its other name
        model = apt.patch_model(tiny_bert(), target_modules=("q", "v", "up", "down")).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        checkpoint = folder / "checkpoint"
        settings = {**PRUNING, **TAUGHT, "event_log": folder / "events.jsonl"}
        if find_whole(checkpoint).exists():
            control = apt.resume_checkpoint(checkpoint, model, optimizer, **settings)
        else:
            torch.manual_seed(1)
            (folder / "events.jsonl").unlink(missing_ok=True)
            control = apt.Controller(model, optimizer, STEPS, **settings)
        for batch in batches(control.step):
            control.loss(model(**batch), batch).backward()
            control.after_backward()
            optimizer.step()
            control.after_step()
            optimizer.zero_grad()
            if control.step % SAVE_EVERY == 0:
                apt.save_checkpoint(control, checkpoint)
                note(folder, control.step, checkpoint)
        apt.export_model(model, folder / "export", overwrite=True)
        return 0

    def lost(self, folder: Path) -> list[str]:
        complaints = []
        for name in ("checkpoint", "export"):
            path = find_quietly(folder / name)
            if not path.exists():
                complaints += [f"{name} is gone"] if name == "export" or noted(folder) else []
            elif not check_manifest(path, "kills"):
                complaints.append(f"{name} has no list of its files")
        path = find_quietly(folder / "checkpoint") / "apt_state.json"
        if path.exists() and json.loads(path.read_text(encoding="utf-8"))["step"] < max(noted(folder), default=0):
            complaints.append(f"the checkpoint of step {max(noted(folder))} is gone")
        return complaints

    def result(self, folder: Path) -> dict[str, Any]:
        return {
            "weights": sum_of(folder / "export" / "model.safetensors"),
            "last": {path.name: sum_of(path) for path in (folder / "checkpoint").glob("*.safetensors")},
            "events": decisions(folder / "events.jsonl"),
            "files": sorted(path.name for path in folder.iterdir() if not path.name.endswith(".log")),
        }


def batches(done: int) -> Iterator[dict[str, torch.Tensor]]:
    """Those that are still to come after so many."""
    for step in range(done, STEPS):
        draw = torch.Generator().manual_seed(step)
        ids = torch.randint(5, 40, (4, 8), generator=draw)
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 1] % 2}


def find_quietly(folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return find_whole(folder)


def sums_below(folder: Path) -> dict[str, str]:
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MARK]
    return {str(path.relative_to(folder)): sum_of(path) for path in paths}


def left_over(folder: Path) -> list[str]:
    """Temporary names, marks and locks that are still there; those of kept tokens are other processes' to remove."""
    ends = (".partial", ".replaced", ".apt-lm", ".lock")
    paths = [path.relative_to(folder) for path in folder.rglob("*") if path.name.endswith(ends)]
    return sorted(str(path) for path in paths if path.parts[0] != "tokens")


def make_earlier(folder: Path, config: Path) -> int:
    """Runs of another seed as `CommandLife` wants them, as a kill would have left two of them; in a child."""
    save, publish = WholeCheckpoints._save_checkpoint, run_folder.publish_run

    def saved(trainer: Any, *args: Any) -> None:
        save(trainer, *args)
        if trainer.state.global_step == 3 * SAVE_EVERY:
            shutil.copytree(partial_of(folder / "finished/run"), partial_of(folder / "unfinished/run"))

    def published(partial: Path, output: Path) -> None:
        shutil.copytree(partial, partial_of(folder / "unnamed/run"))
        publish(partial, output)

    WholeCheckpoints._save_checkpoint = saved  # type: ignore[method-assign]
    run.publish_run = published
    return cli.main(["train", str(config), "training.seed=5", f"output_dir={folder / 'finished/run'}"])


def make_export(folder: Path) -> int:
    """An export that the one of a loop replaces; in a child."""
    apt.export_model(apt.patch_model(tiny_bert(), method="lora", target_modules=("q",)), folder)
    return 0
