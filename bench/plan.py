"""``--minutes`` and ``--resume`` of a benchmark: what is still to be measured; and the folder of this machine."""

import argparse
import os
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from bench.rows import environment, read_rows


def machine(device: str | None = None) -> str:
    """The name of this machine's folder: "cpu", or the name of its GPU in small letters."""
    if device == "cpu" or not torch.cuda.is_available():
        return "cpu"
    return re.sub(r"\W+", "-", torch.cuda.get_device_name().lower()).strip("-")


def results_folder() -> Path:
    """Where every benchmark keeps the rows of this machine: OUT, else its folder in bench/results."""
    return Path(os.environ.get("OUT") or Path("bench/results") / machine())


def results(name: str) -> Path:
    """The rows of one benchmark on this machine."""
    return results_folder() / f"{name}.csv"


def rehearsal_folder(name: str) -> Path:
    """Where figures go that are no results, as they are of toy sizes: OUT, else a folder in bench/scratch."""
    return Path(os.environ.get("OUT") or Path("bench/scratch") / name)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=float("inf"), help="nothing is begun later than that")
    parser.add_argument("--resume", action="store_true", help="leave out what this commit has measured on this device")


def todo(units: Iterable[dict[str, str]], options: argparse.Namespace) -> Iterator[dict[str, str]]:
    """The units that are to be measured now, one by one; those that the time does not allow are named.

    Args:
        units: columns that a row of the unit has; with ``--resume`` one with such a row of this commit, device and
            torch is left out.
        options: `minutes`, `resume` and `out`.
    """
    deadline, here = time.monotonic() + 60.0 * options.minutes, environment()
    here = {name: str(here[name]) for name in ("device", "torch", "commit")}
    for unit in units:
        wanted = unit | here
        rows = read_rows(options.out) if options.resume else []
        if any(all(row.get(name) == value for name, value in wanted.items()) for row in rows):
            continue
        if time.monotonic() >= deadline:
            print(f"unmeasured, the time was up: {', '.join(unit.values())}", flush=True)
            continue
        yield unit
