"""Accuracy, training time and latency of full fine-tuning, PEFT LoRA and APT on one task, side by side.

``python -m bench.finetune [--config examples/demo.yaml] [--arms lora apt-60 apt-80 full] [--seeds 0 1 2]``

Every run is a process of its own with the same data, epochs, batches and seed; arms of one seed follow each other, so a
machine that drifts touches them alike. One CSV row a run; rows that are there already are skipped, so a comparison that
was stopped goes on. The Markdown table beside the CSV is drawn from the CSV alone. LoRA is PEFT's, with the modules,
the rank and alpha = rank * scale of the config; all arms train the pooler and the classifier too.
"""

import argparse
import statistics
from pathlib import Path

from bench.arms import run_apart
from bench.plan import results
from bench.rows import append_row, read_rows

COLUMNS = ("accuracy", "train_seconds", "sparsity", "speedup")


def table(rows: list[dict[str, str]]) -> str:
    """Means over the seeds with their spread; times are ratios to LoRA of the same seed, wall clock and CPU seconds."""
    lora = {(row["seed"], row["overrides"]): row for row in rows if row["arm"] == "lora"}
    lines = [
        "| arm | seeds | accuracy | over LoRA | sparsity | training, wall s | over LoRA | CPU s over LoRA | speed-up |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for arm, overrides in dict.fromkeys((row["arm"], row["overrides"]) for row in rows):
        mine = [row for row in rows if (row["arm"], row["overrides"]) == (arm, overrides)]
        paired = [row for row in mine if (row["seed"], overrides) in lora]
        values = {name: [float(row[name]) for row in mine] for name in COLUMNS}
        lines.append(
            f"| {arm} {overrides}".rstrip() + f" | {len(mine)} | {_spread(values['accuracy'], 4)} "
            f"| {_ratio_of_means(paired, lora, 'accuracy')} "
            f"| {_spread(values['sparsity'], 3)} | {_spread(values['train_seconds'], 0)} "
            f"| {_spread(_ratios(paired, lora, 'train_seconds'), 3)} "
            f"| {_spread(_ratios(paired, lora, 'train_cpu_seconds'), 3)} | {_spread(values['speedup'], 2)} |"
        )
    return "\n".join(lines) + "\n"


LoraRows = dict[tuple[str, str], dict[str, str]]  # by seed and overrides


def _ratios(rows: list[dict[str, str]], lora: LoraRows, name: str) -> list[float]:
    return [float(row[name]) / float(lora[row["seed"], row["overrides"]][name]) for row in rows]


def _ratio_of_means(rows: list[dict[str, str]], lora: LoraRows, name: str) -> str:
    if not rows:
        return ""
    theirs = statistics.mean(float(lora[row["seed"], row["overrides"]][name]) for row in rows)
    return f"{statistics.mean(float(row[name]) for row in rows) / theirs:.4f}"


def _spread(values: list[float], digits: int) -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("examples/demo.yaml"))
    parser.add_argument("--arms", nargs="+", default=["lora", "apt-60", "apt-80", "full"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=results("finetune"))
    parser.add_argument("--set", nargs="*", default=[], help="key=value overrides of the config, for every arm")
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        for arm in arguments.arms:
            done = {(row["arm"], row["seed"], row["overrides"]) for row in read_rows(arguments.out)}
            if (arm, str(seed), " ".join(arguments.set)) in done:
                continue
            row = run_apart(arguments.config, arm, seed, arguments.set)
            append_row(arguments.out, row)
            print(f"{arm} seed {seed}: accuracy {row['accuracy']:.4f}, {row['train_seconds']} s", flush=True)
    text = table(read_rows(arguments.out))
    arguments.out.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
