"""The T5 of `bench.copy_task` loses half of its layers' parameters at once, without training: with and without repair.

``python -m bench.copy_task_cut [--seeds 0 1 2] [--sparsity 0.5] [--arms ...]``, two minutes a seed on one core.

`apt.compress` chooses units and repairs what reads them, on batches of new sequences. The same units are then cut from
a copy without repair. Exact match is that of `bench.copy_task`, of models that were exported and loaded. One CSV row a
seed and arm, an arm being what is set beyond the defaults of `apt.compress`; rows that are there already are skipped.
Arms were chosen on 500 sequences that are not the held-out ones.
"""

import argparse
import copy
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import apt
from apt.surgery import patch_state
from apt.surgery.event import apply_event
from bench import copy_task
from bench.grid import Rows
from bench.plan import results
from bench.rows import append_row, environment, read_rows

BATCHES = {"moment_batches": 64, "calibration_batches": 32}
ARMS: dict[str, dict[str, Any]] = {
    "the defaults of compress": {},
    # Without it some layer keeps a single head, and what depended on two cannot be given to one.
    "at least 2 heads a layer": {"min_heads": 2},
    "the streams not corrected": {"repair": "weights"},
    "all units in one round": {"rounds": 1},
}


def run(model: Any, seed: int, arm: str, sparsity: float) -> dict[str, Any]:
    """Cut a copy of a dense model, repaired and not, and compare all three on the same held-out sequences."""
    held_out = copy_task.held_out_sequences(seed)
    draw = torch.Generator().manual_seed(20_000 + seed)
    batches = [copy_task.sequences(copy_task.BATCH, draw) for _ in range(max(BATCHES.values()))]
    repaired, cut = copy.deepcopy(model), copy.deepcopy(model)
    started = time.process_time()
    apt.compress(repaired, batches, sparsity, round_to=copy_task.ROUND_TO, **BATCHES, **ARMS[arm])
    seconds = time.process_time() - started
    event = patch_state(repaired).past[-1]
    assert event.prune is not None
    apply_event(apt.patch_model(cut, patch_state(repaired).config), event)  # the same units; their repair is no part
    notes = list((event.prune.repair or {}).values())
    counts = apt.summary(repaired)
    return {
        "arm": arm,
        "seed": seed,
        "target_sparsity": sparsity,
        "sparsity": round(counts.sparsity, 4),
        "exact_match_dense": copy_task.exact_match(model, held_out),
        "exact_match_cut": copy_task.exact_match(copy_task.deployed(cut), held_out),
        "exact_match_repaired": copy_task.exact_match(copy_task.deployed(repaired), held_out),
        "error_cut": round(statistics.mean(note.before for note in notes), 4),
        "error_repaired": round(statistics.mean(note.after for note in notes), 4),
        "compress_cpu_seconds": round(seconds, 1),
        "params_dense": counts.params_before,
        "params_pruned": counts.params_after,
        "units": " ".join(f"{name}={count}" for name, count in counts.units.items()),
    }


def table(rows: Rows) -> str:
    """One line an arm and seed."""
    header = ["arm", "seed", "sparsity", "exact match, dense", "cut", "cut and repaired"]
    header += ["mean error of a projection, cut", "repaired", "compress, CPU s"]
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    for row in sorted(rows, key=lambda row: (row["target_sparsity"], list(ARMS).index(row["arm"]), row["seed"])):
        matches = [f"{float(row[f'exact_match_{which}']):.3f}" for which in ("dense", "cut", "repaired")]
        errors = [f"{float(row[f'error_{which}']):.3f}" for which in ("cut", "repaired")]
        cells = [row["arm"], row["seed"], f"{float(row['sparsity']):.1%}", *matches, *errors]
        lines.append(f"| {' | '.join(cells)} | {row['compress_cpu_seconds']} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--out", type=Path, default=results("copy_task_cut"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for seed in arguments.seeds:
        done = {(row["arm"], row["seed"], row["target_sparsity"]) for row in read_rows(arguments.out)}
        arms = [arm for arm in arguments.arms if (arm, str(seed), str(arguments.sparsity)) not in done]
        if not arms:
            continue
        model = copy_task.dense_model(seed, copy_task.DENSE_STEPS, torch.Generator().manual_seed(seed)).eval()
        for arm in arms:
            row = run(model, seed, arm, arguments.sparsity)
            append_row(arguments.out, row | environment())
            print({key: row[key] for key in ("arm", "seed", "exact_match_cut", "exact_match_repaired")}, flush=True)
    text = table(read_rows(arguments.out))
    arguments.out.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
