"""A grid of training runs that can be stopped at any time and goes on where it stopped, and how long the rest takes."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.arms import ROW, kept_lora, run_apart
from bench.rivals import KINDS
from bench.rows import append_row, read_rows

Rows = list[dict[str, str]]


@dataclass(frozen=True)
class Cell:
    """One kind of run of a grid."""

    arm: str  # of `bench.arms`
    overrides: list[str] = field(default_factory=list)  # key=value on top of the config
    seeds: int = 1  # seeds 0, 1, ... of it


def runs(grid: Mapping[str, Cell], seeds: Sequence[int] | None = None) -> list[tuple[str, int]]:
    """Label and seed of every run, seed by seed, so that a grid stopped early compares runs of one seed."""
    chosen = [(label, seed) for label, cell in grid.items() for seed in (seeds or range(cell.seeds))]
    return sorted(chosen, key=lambda run: run[1])


def done(rows: Rows) -> set[tuple[str, int]]:
    return {(row["label"], int(row["seed"])) for row in rows}


def fill(
    out: Path, config: Path, grid: Mapping[str, Cell], seeds: Sequence[int] | None, common: list[str], points: int = 0
) -> None:
    """Do every run that has no row yet, each in a process of its own; one row a run, written as soon as it is there.

    Hours may lie between two rows, and machines differ by the hour. So a row has, as `lora_cpu_seconds`, what training
    LoRA of its seed took here, where that is kept for the rivals.

    Raises:
        SystemExit: a run failed, or the file has runs of other settings.
    """
    for label, seed in runs(grid, seeds):
        cell = grid[label]
        overrides = [*common, *cell.overrides]
        before = [row for row in read_rows(out) if row["label"] == label]
        if any(row["overrides"] != " ".join(overrides) for row in before):
            raise SystemExit(f"{out} holds {label} with other settings, {before[0]['overrides']!r}; name another --out")
        if (label, seed) in done(before):
            continue
        keep = kept_lora(config, seed, overrides) if cell.arm == "lora" else None
        row = {"label": label} | run_apart(config, cell.arm, seed, overrides, points, keep)
        append_row(out, row | _lora_beside(kept_lora(config, seed, common)))
        print(f"{label} seed {seed}: accuracy {row['accuracy']:.4f}, {row['train_seconds']} s", flush=True)
        print(hours(grid, seeds, read_rows(out)), flush=True)


def _lora_beside(kept: Path) -> dict[str, float]:
    if not (kept / ROW).exists():
        return {}
    return {"lora_cpu_seconds": json.loads((kept / ROW).read_text(encoding="utf-8"))["train_cpu_seconds"]}


def hours(grid: Mapping[str, Cell], seeds: Sequence[int] | None, rows: Rows) -> str:
    """What is done, and what the rest will take by the runs that are: of the same label, arm or kind, else of all."""
    wanted = runs(grid, seeds)
    ready = [run for run in wanted if run in done(rows)]
    spent = sum(_seconds(row) for row in rows if (row["label"], int(row["seed"])) in ready)
    text = f"{len(ready)} of {len(wanted)} runs done in {spent / 3600:.2f} h"
    if not ready or len(ready) == len(wanted):
        return text
    left = sum(_expected(run[0], grid[run[0]], rows) for run in wanted if run not in ready)
    return f"{text}; the rest takes about {left / 3600:.2f} h, the whole grid {(spent + left) / 3600:.2f} h"


def _expected(label: str, cell: Cell, rows: Rows) -> float:
    """Seconds of a run, from the rows most like it."""
    kind = cell.arm.rpartition("-")[0]
    same = [
        [row for row in rows if row["label"] == label],
        [row for row in rows if row["arm"] == cell.arm],
        [row for row in rows if row["arm"].rpartition("-")[0] == kind] if kind not in ("", *KINDS) else [],
        [row for row in rows if kind in KINDS and row["arm"].rpartition("-")[0] in KINDS],
        rows,
    ]
    return statistics.mean(_seconds(row) for row in next(group for group in same if group))


def _seconds(row: dict[str, str]) -> float:
    """Of a whole run; of its training where the row is from before that was noted."""
    return float(row.get("run_seconds") or row["train_seconds"])
