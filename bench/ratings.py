"""LoRA and APT on reviews with ratings, a number and three classes: ``python -m bench.ratings``.

Collects what the runs of ``make ratings`` left: one row a run in bench/results/cpu/ratings.csv, or where --out says.
The Markdown table is drawn from the CSV alone.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

from apt.runs.report.records import RunRecord, load_run
from bench.plan import results
from bench.rows import append_rows, environment, read_rows

FOLDERS = {"mean rating": Path("runs/ratings_grid"), "three classes": Path("runs/sentiment_grid")}
SCORES = ("pearson", "spearman", "mse", "accuracy", "f1")
SIZES = ("sparsity", "params_after", "train_seconds", "latency_ms_dense", "latency_ms_small", "speedup")


def row_of(task: str, run: RunRecord) -> dict[str, Any]:
    """A finished run as a row; its commit is that of the run where it noted one."""
    metrics = run.metrics
    row = {"task": task, "arm": run.label.rpartition("-seed")[0], "metric": run.metric}
    row |= {name: metrics.get(name, "") for name in ("seed", "train_size", "test_size", *SCORES, *SIZES)}
    versions = {name: version for name, version in metrics["versions"].items() if name != "apt-lm"}
    return row | {"peak_mb": run.peak_mb} | environment() | versions


def table(rows: list[dict[str, str]]) -> str:
    """Means over the seeds, each beside LoRA of the same task and seeds."""
    lines = [
        "| task | run | seeds | score | over LoRA | sparsity | training, s | over LoRA | times dense |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for task, arm in dict.fromkeys((row["task"], row["arm"]) for row in rows):
        mine = {row["seed"]: row for row in rows if (row["task"], row["arm"]) == (task, arm)}
        lora = {row["seed"]: row for row in rows if (row["task"], row["arm"]) == (task, "lora") and row["seed"] in mine}
        metric = next(iter(mine.values()))["metric"]
        scores = [float(row[metric]) for row in mine.values()]
        spread = f" ± {statistics.stdev(scores):.4f}" if len(scores) > 1 else ""
        lines.append(
            f"| {task} | {arm} | {len(mine)} | {metric} {statistics.mean(scores):.4f}{spread} "
            f"| {_over(mine, lora, metric, '.4f')} | {_mean(mine, 'sparsity'):.3f} "
            f"| {_mean(mine, 'train_seconds'):.0f} | {_over(mine, lora, 'train_seconds', '.3f')} "
            f"| {_mean(mine, 'speedup'):.2f} |"
        )
    return "\n".join(lines) + "\n"


def _mean(rows: dict[str, dict[str, str]], name: str) -> float:
    return statistics.mean(float(row[name]) for row in rows.values())


def _over(mine: dict[str, dict[str, str]], lora: dict[str, dict[str, str]], name: str, spec: str) -> str:
    """The ratio of the means over the seeds that both have."""
    both = {seed: row for seed, row in mine.items() if seed in lora}
    return format(_mean(both, name) / _mean(lora, name), spec) if both else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=results("ratings"))
    arguments = parser.parse_args()
    there = {(row["task"], row["arm"], row["seed"]) for row in read_rows(arguments.out)}
    for task, folder in FOLDERS.items():
        found = [row_of(task, load_run(file.parent)) for file in sorted(folder.glob("*/metrics.json"))]
        append_rows(arguments.out, [r for r in found if (task, r["arm"], str(r["seed"])) not in there])
    text = table(read_rows(arguments.out))
    arguments.out.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
