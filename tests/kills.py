"""Kills runs with SIGKILL at random moments: ``python tests/kills.py [--kills 100] [--seed 0] [--folder FOLDER]``.

A run of the command into a fresh folder, onto a finished run, onto what a kill left of another, and a loop of one's
own, with a teacher, events that cut and grow, and a checkpoint every four steps. A third of the kills come at any
second of a life, a third within a phase of it (an event, a checkpoint, an export, a renaming, ...), a third just before
a change of a file or a folder. Then the user's answer runs, and may be killed again, up to three times.

After each kill every checkpoint of a complete name is read, and what was finished before is looked for. In the end
weights, decisions, metrics and every checkpoint are those of a run that was left alone, bit for bit, and no temporary
name is left. ``--every PHASE`` kills before each change of a file in a phase in turn, ``--lives`` says which lives. The
exit code is 1 where anything differs.
"""

import argparse
import collections
import json
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import killable
from kill_lives import SETTINGS, CommandLife, Life, LoopLife, left_over, make_earlier, make_export, noted, watch
from killable import Moment, Story, draw_moment, run_child
from tiny_run import write_config

AGAIN = 3  # kills of one trial at most
KINDS = ("clock", "phase", "file")


LIVES = ("fresh", "finished", "unfinished", "unnamed", "loop")


def make_lives(names: list[str], folder: Path) -> list[Life]:
    """Lives of these kinds, with what they need in a folder."""
    config, log = write_config(folder, **SETTINGS), folder / "made.log"
    needed = [lambda: make_earlier(folder, config)] if {*names} & {"finished", "unfinished", "unnamed"} else []
    needed += [lambda: make_export(folder / "export")] if "loop" in names else []
    for make in needed:
        assert run_child(make, log).code == 0, log.read_text(encoding="utf-8")
    return [LoopLife(folder / "export") if name == "loop" else CommandLife(config, name, folder) for name in names]


class Trials:
    """The trials of one kind of life.

    Args:
        life: that is lived.
        folder: gets a folder for each trial.
    """

    def __init__(self, life: Life, folder: Path) -> None:
        self.life, self.folder = life, folder
        begun = self._begin("undisturbed")
        end = run_child(lambda: self._live(begun, again=False), self._log(begun))
        assert end.code == 0, self._log(begun).read_text(encoding="utf-8")
        assert not left_over(begun), left_over(begun)
        self.story: Story = end.story
        self.right, self.checkpoints = life.result(begun), noted(begun)

    def _log(self, trial: Path) -> Path:
        return trial.with_name(trial.name + ".log")

    def _begin(self, name: str) -> Path:
        trial = self.folder / f"{self.life.name}-{name}"
        trial.mkdir()
        self.life.prepare(trial)
        return trial

    def _live(self, trial: Path, *, again: bool) -> int:
        watch()
        return self.life.live(trial, again=again)

    def trial(self, name: str, moments: list[Moment]) -> dict[str, Any]:
        """Kill at each of the moments, go on after each, and compare what comes of it."""
        trial = self._begin(name)
        kills: list[dict[str, Any]] = []
        code = 0
        for moment in [*moments, None]:
            end = run_child(lambda: self._live(trial, again=bool(kills)), self._log(trial), moment)
            code = end.code
            if code != -signal.SIGKILL:
                break
            lost = self.life.lost(trial)
            kills.append({"kind": moment.kind if moment else "", "phase": end.phase, "lost": lost})
        differing = [] if code else self._differing(trial)
        return {
            "trial": trial.name,
            "kills": kills,
            "exit": code,
            "differing": differing,
            "left": [] if code else left_over(trial),
        }

    def _differing(self, trial: Path) -> list[str]:
        found = self.life.result(trial)
        steps = [f"checkpoint-{step}" for step, sums in noted(trial).items() if sums != self.checkpoints[step]]
        return [name for name, value in self.right.items() if found[name] != value] + steps


def is_good(row: dict[str, Any]) -> bool:
    return not (row["exit"] or row["differing"] or row["left"] or any(kill["lost"] for kill in row["kills"]))


def draw_trials(all_trials: list[Trials], kills: int, seed: int) -> list[dict[str, Any]]:
    """Trials until so many kills have fallen."""
    draw = random.Random(seed)
    rows: list[dict[str, Any]] = []
    left = kills
    while left:
        trials = all_trials[len(rows) % len(all_trials)]
        count = min(left, draw.choice(range(1, AGAIN + 1)))
        moments = [draw_moment(draw.choice(KINDS), trials.story, draw) for _ in range(count)]
        rows.append(trials.trial(str(len(rows)), moments))
        left -= len(rows[-1]["kills"])
        if not is_good(rows[-1]):
            print(json.dumps(rows[-1]), flush=True)
    return rows


def every_change(all_trials: list[Trials], phases: list[str]) -> list[dict[str, Any]]:
    """A trial for each change of a file in some phases of each life."""
    rows = []
    for trials in all_trials:
        for number in sorted(number for phase in phases for number in trials.story.changes_in(phase)):
            rows.append(trials.trial(f"change{number}", [Moment("file", number=number)]))
            if not is_good(rows[-1]):
                print(json.dumps(rows[-1]), flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Where the kills fell, and what became of the runs."""
    counts: dict[str, collections.Counter[str]] = {phase: collections.Counter() for phase in killable.PHASES}
    for row in rows:
        for kill in row["kills"]:
            seen = counts[kill["phase"]]
            seen.update(["kills", f"by {kill['kind']}"])
            seen["resumed"] += row["exit"] == 0
            seen["equal"] += row["exit"] == 0 and not row["differing"]
            seen["lost"] += len(kill["lost"])
            seen["left"] += bool(row["left"])
    counts["all"] = sum(counts.values(), collections.Counter())
    columns = ("kills", *(f"by {kind}" for kind in KINDS), "resumed", "equal", "lost", "left")
    lines = [f"{'phase':12}" + "".join(f"{name:>10}" for name in columns)]
    lines += [f"{phase:12}" + "".join(f"{seen[name]:10}" for name in columns) for phase, seen in counts.items()]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where the trials stay; by default they go")
    parser.add_argument("--lives", nargs="+", choices=LIVES, default=LIVES)
    parser.add_argument("--every", nargs="+", choices=killable.PHASES, help="kill before each change of a file there")
    arguments = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        trials = [Trials(life, folder) for life in make_lives(arguments.lives, folder)]
        if arguments.every is None:
            rows = draw_trials(trials, arguments.kills, arguments.seed)
        else:
            rows = every_change(trials, arguments.every)
    print(table(rows))
    print(f"{len(rows)} runs, {sum(map(is_good, rows))} good, {time.monotonic() - began:.0f} s")
    return 0 if all(map(is_good, rows)) else 1


if __name__ == "__main__":
    sys.exit(main())
