"""One step of each way to fine-tune: time, memory, FLOPs: ``python -m bench.train_step [--shapes minilm ...]``.

Random weights, forward, backward and AdamW step. Every contestant runs in a process of its own: first alone, for its
peak memory, then in turns with PEFT's LoRA and with the frozen model (forward and input gradient only: the limit of any
adapter), so that a noisy machine touches all three alike. On a GPU one process has them all, and time is told by the
device's clock and by the clock on the wall, which counts the host too. Outputs are compared with the plain model's
before anything is timed (`bench.arena`). One row each in bench/results/cpu/train_step.csv, or where --out says; the
table beside it is drawn from them.
"""

import argparse
import gc
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from bench import against, plan
from bench.arena import REFERENCE, SECONDS, Arena, measure
from bench.contestants import CONTESTANTS
from bench.forced import GPU_CONTESTANTS, find, why_not
from bench.rows import append_row, environment, read_rows
from bench.shapes import CPU_SHAPES, GPU_SHAPES, SHAPES
from bench.turns import TURNS

KEY = ("shape", "layers", "dtype", "contestant")  # what a row is about
WALL = ["wall ms", "wall over PEFT"]  # columns on a GPU


def in_order(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """What was timed, shape by shape and contestant by contestant, what is no longer measured last.

    Rows of one kind stay as they came.
    """
    places = {name: place for names in (SHAPES, CONTESTANTS) for place, name in enumerate(names)}
    timed = [row for row in rows if row.get("status", "ok") in ("", "ok")]
    return sorted(timed, key=lambda row: [places.get(row[key], len(places)) for key in ("shape", "contestant")])


def table(rows: list[dict[str, str]]) -> str:
    """The latest row of each contestant, shape by shape; what is slower than PEFT is marked."""
    kinds = ("shape", "layers", "dtype", "device", "contestant")
    latest = {tuple(row[key] for key in kinds): row for row in in_order(rows)}
    lines = []
    for key in dict.fromkeys(key[:4] for key in latest):
        mine = [row for other, row in latest.items() if other[:4] == key]
        reference = next((float(row["peak_mb"]) for row in mine if row["contestant"] == REFERENCE), None)
        first = mine[0]
        layers = f"{key[1]} of {first['of_layers']} layers"
        walled = any(row.get("wall_ms_p50") for row in mine)
        header = ["", "ms", "over PEFT", *WALL * walled, "of the limit's speed", "tokens/s", "peak MB", "over PEFT"]
        lines += [
            f"**{key[0]}**, {layers}, {first['batch']} x {first['tokens']} tokens, {key[2]}, {key[3]}",
            "",
            f"| {' | '.join([*header, 'GFLOP'])} |".replace("|  |", "| |"),
            "|---" * (len(header) + 1) + "|",
            *(_line(row, reference, walled) for row in mine),
            "",
        ]
    lines += [f"- {row['status']}: {row['shape']}, {row['contestant']}: {row['note']}" for row in _lost(rows)]
    return "\n".join(lines)


def _line(row: dict[str, str], reference: float | None, walled: bool) -> str:
    memory = f"{float(row['peak_mb']) / reference:.3f}" if reference else "-"
    slower = " (slower)" if row["contestant"].startswith("apt") and float(row["over_peft"]) > 1.0 else ""
    cells = [row["contestant"], f"{float(row['ms_p50']):.1f}", f"{float(row['over_peft']):.3f}{slower}"]
    if walled:
        cells += [f"{float(row['wall_ms_p50']):.1f}", f"{float(row['wall_over_peft']):.3f}"]
    cells += [f"{1.0 / float(row['over_limit']):.3f}", f"{float(row['tokens_per_s']):,.0f}"]
    cells += [f"{float(row['peak_mb']):,.0f}", memory, row["gflop"]]
    return f"| {' | '.join(cells)} |"


def _lost(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """What failed or could not run here."""
    return [row for row in rows if row.get("status", "ok") not in ("", "ok")]


def together(units: Iterable[dict[str, str]], arguments: argparse.Namespace) -> Counter[str]:
    """All contestants in this process, each row written when it is there; one that fails leaves the others theirs.

    Returns:
        How many were timed, failed or could not run here.
    """
    arenas: dict[str, Arena] = {}
    found: Counter[str] = Counter()
    for unit in units:
        row = _try_one(unit, arenas, arguments)
        append_row(arguments.out, row)
        found[row["status"]] += 1
        print(_said(row), flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    return found


def _try_one(unit: dict[str, str], arenas: dict[str, Arena], arguments: argparse.Namespace) -> dict[str, Any]:
    """The row of a contestant, whatever became of it."""
    shape, name = unit["shape"], unit["contestant"]
    try:
        if shape not in arenas:
            arenas.clear()  # the memory of one shape at a time
            arenas[shape] = Arena(shape, getattr(torch, unit["dtype"]), int(unit["layers"]))
        arena = arenas[shape]
        reason = why_not(name, arena.device, arena.dtype)
        if reason:
            return unit | {"status": "unavailable", "note": reason} | environment()
        return arena.measure(name, arguments.runs, arguments.seconds) | {"status": "ok"}
    except Exception as error:
        note = re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")[:300]
        return unit | {"status": "failed", "note": note} | environment()


def one_apart(unit: dict[str, str], arguments: argparse.Namespace) -> None:
    """Measure a contestant in a process of its own, and add its row."""
    shape, name = unit["shape"], unit["contestant"]
    command = [sys.executable, "-m", "bench.train_step", "--one", "--shapes", shape, "--contestants", name]
    command += ["--runs", str(arguments.runs), "--seconds", str(arguments.seconds)]
    command += ["--dtype", arguments.dtype, "--layers", unit["layers"]]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    found = [line[4:] for line in finished.stdout.splitlines() if line.startswith("ROW ")]
    if not found:
        print(f"{shape}, {name}: failed, {finished.stderr.strip().splitlines()[-1:]}", flush=True)
        return
    row = json.loads(found[0])
    append_row(arguments.out, row)
    print(_said(row), flush=True)


def _said(row: dict[str, Any]) -> str:
    if row.get("status", "ok") != "ok":
        return f"{row['shape']}, {row['contestant']}: {row['status']}, {row['note']}"
    shown = f"{row['ms_p50']} ms, {row['over_peft']} of PEFT, {row['peak_mb']} MB"
    return f"{row['shape']}, {row['contestant']}: {shown}"


def options() -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__)
    shapes = list(GPU_SHAPES if cuda else CPU_SHAPES)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=shapes)
    names = list(GPU_CONTESTANTS if cuda else CONTESTANTS)
    also = 'also "NAME by BACKEND", as "apt 60%% by triton"'
    parser.add_argument("--contestants", nargs="+", default=names, help=also)
    parser.add_argument("--together", action="store_true", default=cuda, help="in one process, the default on a GPU")
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="at most, for the turns of a contestant")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16" if cuda else "float32")
    parser.add_argument("--layers", type=int, help="instead of the shape's own number")
    parser.add_argument("--out", type=Path, default=plan.results("train_step"))
    parser.add_argument("--one", action="store_true", help="measure the first contestant here and print its row")
    against.add_option(parser)
    plan.add_options(parser)
    given = parser.parse_args()
    for name in given.contestants:
        find(name)
    return given


def main() -> int:
    arguments = options()
    if arguments.against:
        print(against.compare("bench.train_step", KEY, arguments.against, sys.argv[1:]))
        return 0
    if arguments.one:
        dtype = getattr(torch, arguments.dtype)
        (shape, *_), (name, *_) = arguments.shapes, arguments.contestants
        row = measure(shape, name, arguments.runs, dtype, arguments.layers, arguments.seconds)
        print("ROW " + json.dumps(row), flush=True)
        return 0
    TURNS.give()  # each contestant's process takes its own
    layers = {shape: str(arguments.layers or SHAPES[shape].layers) for shape in arguments.shapes}
    units = [
        {"shape": shape, "contestant": name, "dtype": arguments.dtype, "layers": layers[shape]}
        for shape in arguments.shapes
        for name in arguments.contestants
    ]
    left = plan.todo(units, arguments)
    if arguments.together:
        found = together(left, arguments)
        print(table(read_rows(arguments.out)))
        print(", ".join(f"{count} contestants {status}" for status, count in found.items()))
        return 1 if found["failed"] else 0
    for unit in left:
        one_apart(unit, arguments)
    text = table(read_rows(arguments.out))
    arguments.out.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
