"""What distillation and each part of the method are worth: APT with one part left out, against APT and PEFT's LoRA.

``python -m bench.ablations [--config examples/demo.yaml] [--seeds 0 1 2] [--only apt-60 w/o_AT]``

Every run is one row of the accuracy.csv that `bench.accuracy` fills too, with the answer to each test sentence; rows
that are there already are skipped, so a grid that was stopped goes on (`bench.grid`). The table is drawn from the CSV
alone. The interval is a paired bootstrap over the test sentences, each sentence averaged over its seeds.
"""

import argparse
import statistics
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench.grid import Cell, fill
from bench.plan import results
from bench.rows import read_rows

# The teacher is the model before its first mask falls: in a short run it has to learn for a while first. Chosen on
# 1,500 sentences held out of the training data, seed 0.
LATER = ["pruning.prune_start=0.2", "pruning.prune_end=0.5", "distillation.distill_end=0.7"]
DISTILLED = ["distillation.use_self_distillation=true", *LATER]
# label: (arm, overrides, the label it is compared with)
GRID: dict[str, tuple[str, list[str], str]] = {
    "lora": ("lora", [], ""),
    "apt-60": ("apt-60", DISTILLED, "lora"),
    "apt-80": ("apt-80", DISTILLED, "lora"),
    "apt-90": ("apt-90", DISTILLED, "lora"),
    "w/o_Ap": ("apt-60", [*DISTILLED, "ablation=w/o_Ap"], "apt-60"),
    "w/o_AT": ("apt-60", [*DISTILLED, "ablation=w/o_AT"], "apt-60"),
    "w/o_Ds": ("apt-60", [*DISTILLED, "ablation=w/o_Ds"], "apt-60"),
    "uniform_growth": ("apt-60", [*DISTILLED, "ablation=uniform_growth"], "apt-60"),
}
DRAWS = 10_000
POINTS = 10  # of a run, at which accuracy is taken


def paired_bootstrap(mine: NDArray[np.float64], theirs: NDArray[np.float64], seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean difference between two vectors of scores of the same sentences, by resampling them."""
    difference = mine - theirs
    draw = np.random.default_rng(seed).integers(len(difference), size=(DRAWS, len(difference)), dtype=np.int32)
    low, high = np.quantile(difference[draw].mean(1), [0.025, 0.975])
    return float(low), float(high)


def table(rows: list[dict[str, str]]) -> str:
    """Means over the seeds, and differences over the seeds that both sides have."""
    lines = [
        "| run | seeds | accuracy | over LoRA | against | difference, points | 95 % interval | training, CPU s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for label, (_, _, other) in GRID.items():
        mine = {row["seed"]: row for row in rows if row["label"] == label}
        if not mine:
            continue
        theirs = {row["seed"]: row for row in rows if row["label"] == other}
        lora = {row["seed"]: row for row in rows if row["label"] == "lora"}
        over, _ = compare(mine, lora)
        _, interval = compare(mine, theirs)
        accuracies = [float(row["accuracy"]) for row in mine.values()]
        spread = f" ± {statistics.stdev(accuracies):.4f}" if len(accuracies) > 1 else ""
        seconds = statistics.mean(float(row["train_cpu_seconds"]) for row in mine.values())
        lines.append(
            f"| {label} | {len(mine)} | {statistics.mean(accuracies):.4f}{spread} | {over} | {other or '-'} "
            f"| {interval} | {seconds:.0f} |"
        )
    return "\n".join(lines) + "\n"


def compare(mine: dict[str, dict[str, str]], theirs: dict[str, dict[str, str]]) -> tuple[str, str]:
    """The ratio of mean accuracies, and the difference with its interval: two cells."""
    seeds = [seed for seed in mine if seed in theirs]
    if not seeds:
        return "-", "- | -"
    ours, others = (np.mean([correct(table[seed]) for seed in seeds], axis=0) for table in (mine, theirs))
    low, high = paired_bootstrap(ours, others)
    points = 100.0 * (ours.mean() - others.mean())
    return f"{ours.mean() / others.mean():.4f}", f"{points:+.2f} | {100 * low:+.2f} to {100 * high:+.2f}"


def correct(row: dict[str, str]) -> NDArray[np.float64]:
    """1 where a test sentence was answered rightly, else 0."""
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(row["correct"]), dtype=np.uint8))
    return bits[: int(row["test_size"])].astype(np.float64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("examples/demo.yaml"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=list(GRID), default=list(GRID))
    parser.add_argument("--out", type=Path, default=results("accuracy"))
    arguments = parser.parse_args()
    grid = {label: Cell(*GRID[label][:2]) for label in arguments.only}
    fill(arguments.out, arguments.config, grid, arguments.seeds, [], points=POINTS)
    text = table(read_rows(arguments.out))
    arguments.out.with_name("ablations.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
