"""Kills runs with SIGKILL and resumes them: ``python tests/kill_and_resume.py FOLDER --kills 20 [--seed 0]``.

Each trial draws a step and a place in it: the forward pass, the backward pass, the event or the masks, halfway through
a file of a checkpoint, before or after its renaming, or the time after the last step. Half of the trials are killed a
second time. One line of JSON a trial; the exit code is 1 where weights, decisions or the metrics file differ from those
of a run that was left alone. With ``--distil`` all of them have a teacher. Runs are forked from one process that has
imported everything and computed nothing.
"""

import argparse
import gc
import json
import os
import random
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
from tiny_run import write_config

from apt import cli
from apt.files.whole import read_jsonl
from apt.runs import measure, run
from apt.training import whole_checkpoints
from apt.training.controller import Controller

STEPS, SAVE_EVERY = 48, 7  # 24 steps an epoch
PLACES = ("forward", "backward", "event", "file", "before the name", "after the name", "measuring", "naming")
SETTINGS: dict[str, dict[str, Any]] = {
    "training": {"max_steps": STEPS, "save_steps": SAVE_EVERY, "logging_steps": 50},
    "pruning": {"num_events": 3, "prune_end": 0.8},  # after 13, 25 and 38 steps; masks fall in between
    "evaluation": {"event_timing_steps": 0, "inference_repeats": 1},
}
TAUGHT = {"use_self_distillation": True, "distill_end": 0.9}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner: Any, name: str, due: Callable[..., bool]) -> None:
    """Die in front of a call for which `due` says so."""
    original = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if due(*args, **kwargs):
            die()
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


def set_trap(place: str, step: int, draw: random.Random) -> None:
    """Arm this process."""
    if place == "forward":
        before(Controller, "loss", lambda controller, *_: controller.step + 1 == step)
    elif place == "backward":
        before(Controller, "after_backward", lambda controller: controller.step + 1 == step)
    elif place == "event":
        before(Controller, "after_step", lambda controller: controller.step + 1 == step)
    elif place == "file":
        half_a_file(step, draw.randrange(4))
    elif place == "before the name":
        before(whole_checkpoints, "publish_folder", lambda _, folder: int(folder.name.rpartition("-")[2]) >= step)
    elif place == "after the name":
        before(whole_checkpoints.WholeCheckpoints, "_rotate", lambda _, folder: newest(folder) >= step)
    elif place == "measuring":
        before(measure, "export_model", lambda *_, **__: True)
    elif place == "naming":
        before(run, "publish_run", lambda *_: True)


def newest(folder: Path) -> int:
    return max(int(path.name.rpartition("-")[2]) for path in folder.glob("checkpoint-*"))


def half_a_file(step: int, number: int) -> None:
    """Of the first checkpoint from a step on, cut the file of that number: optimizer, schedule, random state, ..."""
    original, written = torch.save, {"files": 0, "step": 0}
    before(Controller, "after_step", lambda controller: bool(written.update(step=controller.step + 1)))

    def save(value: Any, target: Any, *args: Any, **kwargs: Any) -> None:
        original(value, target, *args, **kwargs)
        if written["step"] >= step:
            written["files"] += 1
            if written["files"] > number:
                os.truncate(target, os.path.getsize(target) // 2)
                die()

    torch.save = save


def forked(arguments: list[str], log: Path, arm: Callable[[], None] | None = None) -> int:
    """Run the command in a process of its own; its exit code, or minus the signal that ended it."""
    pid = os.fork()
    if not pid:
        code = 70
        try:
            with log.open("a", encoding="utf-8") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            if arm is not None:
                arm()
            code = cli.main(arguments)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def outcome(folder: Path) -> tuple[bytes, list[Any], bytes]:
    """The weights of the export, what the events decided, and the metrics file."""
    events = [(row["step"], row["prune"], row["rank"]) for row in read_jsonl(folder / "events.jsonl")]
    return (folder / "model" / "model.safetensors").read_bytes(), events, (folder / "metrics.json").read_bytes()


def trial(folder: Path, config: Path, number: int, seed: int) -> dict[str, Any]:
    draw = random.Random(1000 * seed + number)
    output, log = folder / f"killed{number}", folder / f"killed{number}.log"
    command, kills = ["train", str(config), f"output_dir={output}"], []
    for again in range(1 + number % 2):
        place, step = PLACES[(number + 5 * again + 3) % len(PLACES)], draw.randint(1, STEPS - SAVE_EVERY)
        resume = ["--resume"] if again else []
        code = forked([*command, *resume], log, lambda place=place, step=step: set_trap(place, step, draw))
        kills.append({"place": place, "step": step, "killed": code == -signal.SIGKILL})
        if code == 0:  # the second trap lay before the checkpoint that the run went on from
            break
    code = forked([*command, "--resume"], log)
    nothing: tuple[bytes, list[Any], bytes] = (b"", [], b"")
    ours, theirs = (outcome(each) if code == 0 else nothing for each in (output, folder / "whole"))
    row = {"trial": number, "kills": kills, "exit": code}
    row |= {f"{what}_equal": ours[i] == theirs[i] for i, what in enumerate(("weights", "events", "metrics"))}
    return row | {"ok": code == 0 and ours == theirs and kills[0]["killed"]}


def every_trap_finds_its_place(log: Path) -> bool:
    """Whether what the traps replace is there; in a process of its own, as they do replace it."""

    def arm() -> None:
        for place in PLACES:
            set_trap(place, 1, random.Random(0))
        os._exit(0)

    return forked([], log, arm) == 0


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--distil", action="store_true")
    arguments = parser.parse_args(given)
    gc.freeze()  # what is imported is no garbage, and every process that is forked would look through it
    config = write_config(arguments.folder, **SETTINGS, distillation=TAUGHT if arguments.distil else {})
    code = forked(["train", str(config), f"output_dir={arguments.folder / 'whole'}"], arguments.folder / "whole.log")
    assert code == 0, (arguments.folder / "whole.log").read_text(encoding="utf-8")
    assert len(outcome(arguments.folder / "whole")[1]) == 3
    rows = []
    for number in range(arguments.first, arguments.first + arguments.kills):
        rows.append(trial(arguments.folder, config, number, arguments.seed))
        print(json.dumps(rows[-1]), flush=True)
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
