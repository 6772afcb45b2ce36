"""What accuracy costs: full fine-tuning, LoRA, its rivals and APT at six sparsities on the demo's task.

``python -m bench.accuracy [--only apt-60 lora ...] [--seeds 0] [--hours]``

Every run is one row of bench/results/cpu/accuracy.csv, or where --out says, and rows that are there already are
skipped, so a grid that was stopped goes on; after each run it says how many hours the rest takes. ``--hours`` says that
and runs nothing. Tables and pictures are drawn from the CSV alone (`bench.report`).

Besides what `bench.arms` measures, accuracy on 1,000 of the test sentences is taken at points of the run, which gives
the time to 97 % of what full fine-tuning ends with on the same sentences, at the final size.
"""

import argparse
import math
import re
import statistics
from pathlib import Path

import numpy as np

from bench.ablations import DISTILLED, POINTS, correct, paired_bootstrap
from bench.ablations import GRID as ABLATIONS
from bench.grid import Cell, Rows, fill, hours
from bench.plan import results
from bench.rows import read_rows

SPARSITIES = (40, 60, 70, 80, 90)
THREE = ("lora", "apt-60", "apt-80")  # what has three seeds
SHARE = 0.97  # of full fine-tuning's accuracy
UNMEASURED = "unmeasured"

GRID: dict[str, Cell] = {
    "full": Cell("full"),
    **{label: Cell(arm, overrides, 3 if label in THREE else 1) for label, (arm, overrides, _) in ABLATIONS.items()},
    **{f"apt-{percent}": Cell(f"apt-{percent}", DISTILLED) for percent in (40, 70)},
    # On the demo's own schedule; the ablation w/o_Ds has that of the runs with a teacher.
    **{f"apt-{percent} alone": Cell(f"apt-{percent}") for percent in SPARSITIES},
    **{
        f"{kind}-{percent}": Cell(f"{kind}-{percent}")
        for kind in ("prune", "tp-magnitude", "tp-taylor")
        for percent in SPARSITIES
    },
}
SERIES = {  # prefix of a label: what it is, in words
    "full": "full fine-tuning",
    "lora": "PEFT LoRA",
    "prune": "LoRA, pruned at once, LoRA",
    "tp-magnitude": "the same by Torch-Pruning, magnitude",
    "tp-taylor": "the same by Torch-Pruning, Taylor",
    "apt": "APT with teacher",
    "apt alone": "APT",
}
PLACES = {"w/o_Ap": "apt"}  # an ablation that is a point of a series: APT at 0 %


def series(label: str) -> str:
    """The key of `SERIES` that a run belongs to, "" for an ablation beside them."""
    if label in PLACES:
        return PLACES[label]
    found = re.sub(r"-\d+", "", label)
    return found if found in SERIES else ""


def course(row: dict[str, str]) -> list[tuple[float, float, float]]:
    """Seconds of training, accuracy and sparsity at each point of a run."""
    return [tuple(map(float, point.split(":"))) for point in row.get("course", "").split()]  # type: ignore[misc]


def time_to(row: dict[str, str], accuracy: float) -> float | None:
    """Seconds until a run of its final size was as good as that for the first time; None: it never was."""
    points = course(row)
    reached = [seconds for seconds, found, sparsity in points if found >= accuracy and sparsity >= points[-1][2] - 1e-3]
    return min(reached, default=None)


def goal(rows: Rows) -> float | None:
    """What counts as reached: `SHARE` of full fine-tuning's last accuracy, averaged over its seeds."""
    last = [course(row)[-1][1] for row in rows if row["label"] == "full" and course(row)]
    return SHARE * statistics.mean(last) if last else None


def over_lora(row: dict[str, str], rows: Rows) -> float | None:
    """CPU seconds of training over LoRA's: that of the same seed on the same machine where the row holds it, else the
    mean of all LoRA rows; None: there is none."""
    lora = [row["lora_cpu_seconds"]] if row.get("lora_cpu_seconds") else _column(rows, "lora", "train_cpu_seconds")
    return float(row["train_cpu_seconds"]) / statistics.mean(map(float, lora)) if lora else None


def _column(rows: Rows, label: str, name: str) -> list[str]:
    return [row[name] for row in rows if row["label"] == label]


def table(rows: Rows) -> str:
    """Every run of the grid, means over its seeds; what was not run says so. Then the hours, and `beside_apt`."""
    header = ["run", "", "seeds", "sparsity", "accuracy", "over LoRA", "training, s", "CPU s", "CPU s over LoRA"]
    header += ["s to 97 % of full", "answer, ms", "times dense", "parameters", "peak MB"]
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    for label in GRID:
        mine = [row for row in rows if row["label"] == label]
        cells = _cells(mine, rows) if mine else [UNMEASURED] + [""] * (len(header) - 3)
        lines.append("| " + " | ".join([label, SERIES.get(series(label), "ablation"), *cells]) + " |")
    lines += ["", f"{hours(GRID, None, rows)}.", "", *beside_apt(rows), ""]
    return "\n".join(lines)


def beside_apt(rows: Rows) -> list[str]:
    """A table, line by line: APT alone against each other way to the same sizes, where both were run, seed 0."""
    found = {row["label"]: row for row in rows if row["seed"] == "0"}
    lines = []
    for kind in ("apt", "prune", "tp-magnitude", "tp-taylor"):
        labels = {percent: (f"apt-{percent} alone", f"{kind}-{percent}") for percent in SPARSITIES}
        pairs = {p: [found[label] for label in both] for p, both in labels.items() if found.keys() >= {*both}}
        if pairs:
            where = ", ".join(f"{percent} %" for percent in pairs)
            lines.append(f"| {SERIES[kind]} | {where} | {_against(list(pairs.values()), rows)} |")
    header = ["| APT alone against | at | points | 95 % interval | its CPU s over APT's |", "|---|---|---|---|---|"]
    return [*header, *lines] if lines else []


def _against(pairs: list[Rows], rows: Rows) -> str:
    """Of pairs of APT and the other: points between their accuracies, each test sentence averaged over the pairs, with
    the interval, and how much longer the other trains: three cells."""
    ours, theirs = (np.mean([correct(row) for row in side], axis=0) for side in zip(*pairs, strict=True))
    low, high = paired_bootstrap(ours, theirs)
    times = [[over_lora(row, rows) or float("nan") for row in pair] for pair in pairs]
    longer = statistics.mean(other / own for own, other in times)
    points = 100 * (ours.mean() - theirs.mean())
    took = UNMEASURED if math.isnan(longer) else f"{longer:.2f}"
    return f"{points:+.2f} | {100 * low:+.2f} to {100 * high:+.2f} | {took}"


def _cells(rows: Rows, everything: Rows) -> list[str]:
    def mean(name: str) -> float:
        return statistics.mean(float(row[name]) for row in rows)

    lora = _column(everything, "lora", "accuracy")
    times = [ratio for ratio in (over_lora(row, everything) for row in rows) if ratio is not None]
    accuracies = [float(row["accuracy"]) for row in rows]
    spread = f" ± {statistics.stdev(accuracies):.4f}" if len(accuracies) > 1 else ""
    return [
        str(len(rows)),
        f"{mean('sparsity'):.3f}",
        f"{mean('accuracy'):.4f}{spread}",
        f"{mean('accuracy') / statistics.mean(map(float, lora)):.3f}" if lora else UNMEASURED,
        f"{mean('train_seconds'):.0f}",
        f"{mean('train_cpu_seconds'):.0f}",
        f"{statistics.mean(times):.3f}" if times else UNMEASURED,
        _reached(rows, goal(everything)),
        f"{mean('latency_ms_small'):.1f}",
        f"{mean('speedup'):.2f}",
        f"{mean('params'):,.0f}",
        f"{mean('peak_mb'):,.0f}",
    ]


def _reached(rows: Rows, wanted: float | None) -> str:
    """Mean time of the seeds that got there, and how many did where not all."""
    if wanted is None or not all(course(row) for row in rows):
        return UNMEASURED
    times = [time for time in (time_to(row, wanted) for row in rows) if time is not None]
    if not times:
        return "never"
    return f"{statistics.mean(times):.0f}" + (f" ({len(times)} of {len(rows)})" if len(times) < len(rows) else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("examples/demo.yaml"))
    parser.add_argument("--only", nargs="+", choices=list(GRID), default=list(GRID))
    parser.add_argument("--seeds", nargs="+", type=int, help="instead of three for LoRA, APT at 60 and 80 %%, else one")
    parser.add_argument("--set", nargs="*", default=[], help="key=value overrides of the config, for every run")
    parser.add_argument("--points", type=int, default=POINTS, help="at which accuracy is taken during a run")
    parser.add_argument("--hours", action="store_true", help="say how long it takes, by the rows there are")
    parser.add_argument("--out", type=Path, default=results("accuracy"))
    arguments = parser.parse_args()
    grid = {label: GRID[label] for label in arguments.only}
    if arguments.hours:
        print(hours(grid, arguments.seeds, read_rows(arguments.out)))
        return
    fill(arguments.out, arguments.config, grid, arguments.seeds, arguments.set, arguments.points)
    text = table(read_rows(arguments.out))
    arguments.out.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
