"""Every adapter method on one task, beside PEFT's: accuracy, trained parameters, seconds, memory and file size.

``python -m bench.adapters [--arms lora "peft lora" ...] [--seeds 0 1 2]`` for the task of a config,
``python -m bench.adapters --shape deberta-v3-base`` for time and memory of steps and answers alone, on random weights.

Every run is a process of its own and one row of bench/results/cpu/adapters.csv, or where --out says; rows that are
there already are skipped, so a grid that was stopped goes on. The Markdown table beside it is drawn from the CSV alone.
All arms train pooler and classifier, with the same data, batches, epochs and seeds; the adapters have one rank and sit
on the same linears. Gates and prompts have a learning rate of their own (`bench.adapter_arms`), ours and PEFT's alike.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

from bench.ablations import correct, paired_bootstrap
from bench.adapter_arms import ARMS, BASELINE
from bench.apart import row_of
from bench.plan import results
from bench.rows import append_row, read_rows
from bench.shapes import SHAPES

Row = dict[str, str]


def run_apart(arm: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One row, by a process of its own.

    Raises:
        SystemExit: it failed; its last words are the message.
    """
    if options.shape:
        command = ["bench.adapter_steps", arm, options.shape, "--runs", str(options.runs)]
    else:
        command = ["bench.adapter_arms", arm, str(seed), "--config", str(options.config), "--set", *options.set]
    return row_of(command, f"{arm}, seed {seed}")


def fill(options: argparse.Namespace) -> None:
    """Do every run that has no row yet, seed by seed, so that a grid stopped early compares runs of one seed.

    Raises:
        SystemExit: a run failed, or the file has runs of other settings.
    """
    for seed in [0] if options.shape else options.seeds:
        for arm in options.arms:
            rows = [row for row in read_rows(options.out) if row["arm"] == arm and row["shape"] == options.shape]
            other = [row for row in rows if not options.shape and row["overrides"] != " ".join(options.set)]
            if other:
                raise SystemExit(f"{options.out} holds {arm} with {other[0]['overrides']!r}; name another --out")
            if str(seed) in {row["seed"] for row in rows}:
                continue
            row = run_apart(arm, seed, options)
            append_row(options.out, row)
            what = row.get("refused") or (f"{row['ms_p50']} ms" if options.shape else f"accuracy {row['accuracy']:.4f}")
            print(f"{arm} seed {seed}: {what}", flush=True)


def table(rows: list[Row]) -> str:
    """The task, then each shape."""
    parts = [task_table([row for row in rows if not row["shape"]])]
    for shape in dict.fromkeys(row["shape"] for row in rows if row["shape"]):
        parts.append(shape_table(shape, [row for row in rows if row["shape"] == shape]))
    return "\n".join(part for part in parts if part)


def task_table(rows: list[Row]) -> str:
    """Means over the seeds; differences to PEFT's LoRA on the same test sentences, over the seeds that both have."""
    if not rows:
        return ""
    lines = [
        f"| method | seeds | accuracy | points over {BASELINE}, 95 % interval | trained at first | at the end "
        "| ranks or gates in use | training, CPU s | peak memory, MB | file, kB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    baseline = {row["seed"]: row for row in rows if row["arm"] == BASELINE}
    for arm in ARMS:
        mine = [row for row in rows if row["arm"] == arm]
        if not mine:
            continue
        accuracies = [float(row["accuracy"]) for row in mine]
        spread = f" ± {statistics.stdev(accuracies):.4f}" if len(accuracies) > 1 else ""
        ranks = _mean(mine, "ranks") if mine[0].get("ranks") else 0.0  # prompts have none, PEFT's are not counted
        active = f"{_mean(mine, 'active'):,.0f} of {ranks:,.0f}" if ranks else "-"
        lines.append(
            f"| {arm} | {len(mine)} | {statistics.mean(accuracies):.4f}{spread} | {_difference(mine, baseline)} "
            f"| {_mean(mine, 'trainable_start'):,.0f} | {_mean(mine, 'trainable'):,.0f} | {active} "
            f"| {_mean(mine, 'train_cpu_seconds'):.0f} | {_mean(mine, 'peak_mb'):.0f} "
            f"| {_mean(mine, 'file_bytes') / 1e3:,.0f} |"
        )
    return "\n".join(lines) + "\n"


def shape_table(shape: str, rows: list[Row]) -> str:
    """A step in turns with PEFT's LoRA, an answer in turns with the plain model."""
    measured = [row for row in rows if not row.get("refused")]
    size = f", {measured[0]['layers']} of {measured[0]['of']} layers" if measured else ""
    lines = [
        f"{shape}{size}, random weights; a training step beside {BASELINE}'s, an answer beside the plain model's, "
        "which is what a merged adapter costs:",
        "",
        f"| method | step, ms | over {BASELINE} | peak memory, MB | answer, ms | over plain | trained | file, kB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm in ARMS:
        for row in (row for row in rows if row["arm"] == arm):
            if row.get("refused"):
                lines.append(f"| {arm} | refused: {row['refused']} | | | | | | |")
                continue
            lines.append(
                f"| {arm} | {float(row['ms_p50']):.1f} | {float(row['over_peft']):.3f} | {float(row['peak_mb']):.0f} "
                f"| {float(row['answer_ms']):.1f} | {float(row['over_plain']):.3f} "
                f"| {int(row['trainable_start']):,} | {int(row['file_bytes']) / 1e3:,.0f} |"
            )
    return "\n".join(lines) + "\n"


def _mean(rows: list[Row], name: str) -> float:
    return statistics.mean(float(row[name]) for row in rows)


def _difference(mine: list[Row], baseline: dict[str, Row]) -> str:
    pairs = [(row, baseline[row["seed"]]) for row in mine if row["seed"] in baseline]
    if not pairs:
        return "-"
    ours, theirs = (sum(map(correct, side)) / len(pairs) for side in zip(*pairs, strict=True))
    low, high = paired_bootstrap(ours, theirs)
    return f"{100 * (ours.mean() - theirs.mean()):+.2f}, {100 * low:+.2f} to {100 * high:+.2f}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("examples/demo.yaml"))
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--shape", choices=list(SHAPES), default="", help="time and memory only, on random weights")
    parser.add_argument("--runs", type=int, default=7, help="timed turns of a shape")
    parser.add_argument("--out", type=Path, default=results("adapters"))
    parser.add_argument("--set", nargs="*", default=[], help="key=value overrides of the config, for every arm")
    options = parser.parse_args(arguments)
    fill(options)
    text = table(read_rows(options.out))
    options.out.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
