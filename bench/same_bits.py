"""Whether a change of the code's structure changed no bit: the same runs, in this tree and at another git revision.

``python -m bench.same_bits [REF] [--only NAME ...]``; REF is 3fa0c2a unless another is given.

The revision is laid beside this tree, in a temporary folder. Both are run by the command line alone (``python -m apt
train``), as the insides of the two may have other names; nothing here imports `apt`. Each run is a process of its own
on one thread of the CPU, and each side has caches of its own. The sides take turns, case by case; the cases are in
`bench.same_bits_cases`.

Compared is what a run leaves: every tensor of every safetensors file, every key of every JSON file, every line of every
JSON-lines file: weights, gates, events, metrics, losses, shapes. What a clock, the memory or the version decides is
left out, as `IGNORED` and `MEASURED` say. Differences are printed; the exit code is 1 if there is one, or a run fails.

Runs with ``target_speedup`` decide by times that were measured, so no two of them are alike, and none is here.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from bench.same_bits_cases import Case, add_option, all_cases, write_inputs

ROOT = Path(__file__).parent.parent
START = "3fa0c2a"  # the last commit before the files of `apt` were laid into packages
IGNORED = {  # key of a JSON file, wherever it stands -> why two equal runs differ in it
    "seconds": "time: of an event's search and surgery, of a logged step",
    "tokens_per_s": "time: of a logged step",
    "train_runtime": "time: of the whole training",
    "train_samples_per_second": "time: of the whole training",
    "train_steps_per_second": "time: of the whole training",
    "memory_mb": "memory: of the process",
    "peak_mb": "memory: of the process",
    "versions": "the version of this package and the commit are among them",
    "apt_version": "the version of this package, in an export",
}
MEASURED = ("efficiency.json", "event_timing.json")  # files in which every number is a time, or counts what was timed
SHOWN = 10  # differences of a case that are printed; the others are counted
TAIL = 20  # last lines of what a failed run said
PAUSE = 0.02  # seconds between two looks for a checkpoint


@dataclass(frozen=True, kw_only=True)
class Side:
    """A checkout, and the folder for what its runs leave."""

    name: str
    tree: Path
    folder: Path

    def environment(self) -> dict[str, str]:
        alone = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        caches = {"XDG_CACHE_HOME": str(self.folder / "cache"), "HF_HOME": str(self.folder / "hub")}
        return os.environ | alone | caches | {"PYTHONPATH": str(self.tree)}

    def check(self) -> None:
        """Raise SystemExit where Python would take the packages from elsewhere than this checkout."""
        code = "from importlib.util import find_spec as f; print(f('apt').origin); print(f('apt_kernels').origin)"
        command = [sys.executable, "-c", code]
        run = subprocess.run(command, cwd=self.tree, env=self.environment(), capture_output=True, text=True, check=True)
        for origin in run.stdout.splitlines():
            if self.tree.resolve() not in Path(origin).resolve().parents:
                raise SystemExit(f"same_bits: {self.name} must run what stands in {self.tree}, but it finds {origin}")

    def train(self, arguments: Sequence[str], run: Path, log: Path) -> subprocess.Popen[bytes]:
        """Begin a run; what it says is added to the log."""
        command = [sys.executable, "-m", "apt", "train", *arguments, f"output_dir={run}"]
        with log.open("ab") as file:
            return subprocess.Popen(
                command, cwd=self.tree, env=self.environment(), stdout=subprocess.DEVNULL, stderr=file
            )


def differences(here: dict[str, str], there: dict[str, str]) -> list[tuple[str, str, str]]:
    """Keys at which two runs differ, with both values; a key that one of them lacks is one."""
    keys = dict.fromkeys([*here, *there])
    pairs = [(key, here.get(key, "nothing"), there.get(key, "nothing")) for key in keys]
    return [(key, ours, theirs) for key, ours, theirs in pairs if ours != theirs]


def contents(run: Path) -> dict[str, str]:
    """What a run left, as text by key: ``events.jsonl 0.prune.kept.layers.0.heads`` -> ``[0, 2]``."""
    found = {}
    for path in sorted(run.rglob("*")):
        if path.name in MEASURED:
            continue
        leaves: dict[str, str] = {}
        if path.suffix == ".safetensors":
            leaves = _tensors(path)
        elif path.suffix == ".json":
            leaves = _leaves(json.loads(path.read_text(encoding="utf-8")))
        elif path.suffix == ".jsonl":
            lines = path.read_text(encoding="utf-8").splitlines()
            leaves = _leaves({str(number): json.loads(line) for number, line in enumerate(lines)})
        found.update({f"{path.relative_to(run)} {key}": value for key, value in leaves.items()})
    return found


def _tensors(path: Path) -> dict[str, str]:
    """Type, shape and sha256 of every tensor of a file."""
    found = {}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  # it is no dict
            tensor = file.get_tensor(name).contiguous()
            digest = hashlib.sha256(tensor.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
            found[name] = f"{tensor.dtype} {list(tensor.shape)} {digest}"
    return found


def _leaves(value: Any, key: str = "") -> dict[str, str]:
    """The values of nested tables as JSON, which has every bit of a number; a list is one value."""
    if not isinstance(value, dict):
        return {key: json.dumps(value)}
    found = {}
    for name, inner in value.items():
        if name not in IGNORED:
            found.update(_leaves(inner, f"{key}.{name}" if key else name))
    return found


def compare(cases: Sequence[Case], ref: str, root: Path = ROOT) -> list[str]:
    """Run the cases in the tree at `root` and at a revision of it; returns the names of those that are identical.

    Raises:
        SystemExit: git knows no such revision, or a side does not run the code of its checkout.
    """
    data = root / "tests" / "data"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        _unpack(ref, folder / "tree", root)
        sides = [
            Side(name="here", tree=root, folder=folder / "here"),
            Side(name=ref, tree=folder / "tree", folder=folder / "there"),
        ]
        for side in sides:
            side.folder.mkdir()
            side.check()
        write_inputs(folder / "inputs", data, sorted({case.model for case in cases if case.model}))
        return [case.name for case in cases if _is_same(case, case.arguments(folder / "inputs", data), sides)]


def _unpack(ref: str, tree: Path, root: Path) -> None:
    """Lay the files of a revision into a folder."""
    archive = subprocess.run(["git", "archive", "--format=tar", ref], cwd=root, capture_output=True, check=False)
    if archive.returncode:
        raise SystemExit(f"same_bits: git has no files of {ref}: {archive.stderr.decode().strip()}")
    with tarfile.open(fileobj=BytesIO(archive.stdout)) as files:
        files.extractall(tree, filter="data")


def _is_same(case: Case, arguments: list[str], sides: list[Side]) -> bool:
    """Run a case on both sides, and print what came of it."""
    left, seconds = [], []
    for side in sides:
        started = time.perf_counter()
        left.append(_outcome(side, case, arguments))
        seconds.append(f"{time.perf_counter() - started:.1f} s")
    took = " and ".join(seconds)
    if any(outcome is None for outcome in left):
        print(f"failed     {case.name}, {took}", flush=True)
        return False
    here, there = (outcome or {} for outcome in left)
    found = differences(here, there)
    if not found:
        print(f"identical  {case.name}: {len(here)} values, {took}", flush=True)
        return True
    print(f"different  {case.name}: {len(found)} of {len(here)} values, {took}")
    for key, ours, theirs in found[:SHOWN]:
        print(f"    {key}\n        {sides[0].name}: {ours}\n        {sides[1].name}: {theirs}")
    if len(found) > SHOWN:
        print(f"    and {len(found) - SHOWN} more")
    sys.stdout.flush()
    return False


def _outcome(side: Side, case: Case, arguments: list[str]) -> dict[str, str] | None:
    """What a run of a case leaves on a side; None where it failed, whose last lines are printed."""
    run, log = side.folder / "run", side.folder / "log.txt"
    code, found = _carry_out(side, case, arguments, run, log), None
    if code == 0:
        found = contents(run)
    else:
        last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:]
        print(f"{case.name} failed with exit code {code}, {side.name}:", *last, sep="\n    ")
    for folder in (run, _unfinished(run)):
        shutil.rmtree(folder, ignore_errors=True)
    log.unlink()
    return found


def _carry_out(side: Side, case: Case, arguments: list[str], run: Path, log: Path) -> int:
    """Do the run of a case, in two parts where it is to be killed; returns its exit code."""
    if not case.killed:
        return side.train(arguments, run, log).wait()
    first = side.train(arguments, run, log)
    while first.poll() is None and not any(_unfinished(run).glob("checkpoints/checkpoint-*")):
        time.sleep(PAUSE)
    if first.poll() is not None:
        with log.open("a", encoding="utf-8") as file:
            file.write("same_bits: it was over before it could be killed\n")
        return first.returncode or 1
    first.kill()
    first.wait()
    return side.train([*arguments, "--resume"], run, log).wait()


def _unfinished(run: Path) -> Path:
    """Where a run stands until it is whole."""
    return run.with_name(run.name + ".partial")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ref", nargs="?", default=START, metavar="REF", help=f"a git revision; else {START}")
    add_option(parser)
    arguments = parser.parse_args()
    cases = [case for case in all_cases() if case.name in arguments.only]
    same = compare(cases, arguments.ref)
    print(f"{len(same)} of {len(cases)} cases are identical")
    return int(len(same) < len(cases))


if __name__ == "__main__":
    sys.exit(main())
