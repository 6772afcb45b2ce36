"""Memory of a training step of LoRA and of APT as `apt.runs.estimate` counts it: ``python -m bench.footprints``.

Exact sizes of fake tensors of the presets' shapes, so nothing is measured and no machine matters; the process, its
libraries and what an allocator adds are not in it. One row a preset and phase in bench/results/cpu/footprints.csv, or
where --out says; the Markdown table is drawn from the CSV alone.
"""

import argparse
from pathlib import Path

from apt.runs.config import load_config
from apt.runs.estimate.estimate import estimate
from bench.plan import results
from bench.rows import append_rows, environment, read_rows

CONFIGS = ("examples/demo.yaml", "configs/roberta_base_sst2.yaml", "configs/roberta_base_squad_v2.yaml")
CONFIGS = (*CONFIGS, "configs/t5_base_cnn_dm.yaml", "configs/llama2_7b_alpaca.yaml")
ARMS = {
    "LoRA": ["model.method=lora", "distillation.use_self_distillation=false"],
    "APT": ["distillation.use_self_distillation=false"],
    "APT with teacher": ["distillation.use_self_distillation=true"],
}
PHASES = ("before pruning", "first with a teacher", "after the last event")


def rows_of(path: Path, arm: str) -> list[dict[str, object]]:
    """A row for each phase of a run of a config."""
    config = load_config(path, [*ARMS[arm], "hardware.device=cpu"])
    found = estimate(config, baseline=False)
    common = {
        "config": str(path),
        "arm": arm,
        "model": config.model.name.removeprefix("package:").removesuffix("/model").rpartition("/")[2],
        "task": config.model.task,
        "precision": config.hardware.precision,
        "sparsity": config.pruning.target_sparsity,
        "batch": found.batch[0],
        "tokens": found.batch[1],
    }
    return [
        common | {"phase": name, "peak_bytes": phase.peak} | phase.bytes_of | environment()
        for name, phase in found.phases.items()
    ]


def table(rows: list[dict[str, str]]) -> str:
    """A line a config: what LoRA needs, and APT in each phase."""
    lines = [
        "| model, task | batch | pruned | LoRA | APT, before an event | first with a teacher | after the last event |",
        "|---|---|---|---|---|---|---|",
    ]
    latest = {(row["config"], row["arm"], row["phase"]): row for row in rows}
    for config in dict.fromkeys(row["config"] for row in rows):
        first = next(row for key, row in latest.items() if key[0] == config)

        def cell(arm: str, phase: str, config: str = config) -> str:
            row = latest.get((config, arm, phase))
            return f"{int(row['peak_bytes']) / 1e9:,.2f}" if row else "-"

        lines.append(
            f"| {first['model']}, {first['task'].replace('_', ' ')}, {first['precision']} "
            f"| {first['batch']} x {first['tokens']} | {float(first['sparsity']):.0%} "
            f"| {cell('LoRA', PHASES[0])} | {cell('APT', PHASES[0])} | {cell('APT with teacher', PHASES[1])} "
            f"| {cell('APT', PHASES[2])} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--configs", nargs="+", type=Path, default=[Path(path) for path in CONFIGS])
    parser.add_argument("--out", type=Path, default=results("footprints"))
    arguments = parser.parse_args()
    for path in arguments.configs:
        for arm in ARMS:
            try:
                append_rows(arguments.out, rows_of(path, arm))
            except ValueError as error:  # a run that prunes at once has no teacher
                print(f"{path}, {arm}: {error}", flush=True)
    text = table(read_rows(arguments.out))
    arguments.out.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
