"""Runs with a repaired cut, and what they are put beside: a grid, and its table.

`bench.accuracy` runs them on the demo's task; see `bench.plain_cuts` for the cuts that are not this project's.
"""

import statistics
from collections.abc import Mapping

from bench.ablations import compare
from bench.grid import Cell, Rows
from bench.rivals import FISHER

# One early cut. Chosen on 1,500 sentences held out of the demo's training data, at 80 %, seed 0, where LoRA has 0.8173:
# 0.8167 so, 0.8093 with salience fisher.
EARLY = [
    *("pruning.num_events=1", "pruning.prune_end=0.2", "pruning.repair=weights", "pruning.salience=obs"),
    *("pruning.balance=none", "pruning.kurtosis=off", "pruning.calibration_batches=8", "pruning.moment_batches=16"),
]
SEEDS = 3
# 50 and 67 are the sizes of a six-layer encoder with three layers and two.
GRID: dict[str, Cell] = {
    **{f"apt-{percent} repaired": Cell(f"apt-{percent}", EARLY, SEEDS) for percent in (60, 80, 90, 95, 50, 67)},
    **{f"apt-{percent} fisher": Cell(f"apt-{percent}", FISHER, SEEDS) for percent in (60, 80)},
    **{arm: Cell(arm, seeds=SEEDS) for arm in ("first-3", "first-2", "first-1")},
    **{arm: Cell(arm, seeds=SEEDS) for arm in ("influence-3", "influence-2", "influence-1")},
    **{arm: Cell(arm, seeds=SEEDS) for arm in ("ffn-60", "ffn-repaired-60")},
}
SERIES = {  # a label without its number: what it is, in words
    "apt repaired": "APT, one cut, repaired",
    "apt fisher": "the same, not repaired",
    "first": "the first layers, LoRA",
    "influence": "layers of most block influence, LoRA",
    "ffn": "FFNs of one width, LoRA",
    "ffn-repaired": "FFNs of one width, repaired, LoRA",
}


def beside_lora(rows: Rows, over_lora: Mapping[tuple[str, str], float]) -> list[str]:
    """A table, line by line: each of these runs against LoRA of the same seeds; nothing where none was run.

    Args:
        rows: of the grid, LoRA's among them.
        over_lora: CPU seconds of a run over LoRA's, by label and seed, where both are known.
    """
    lora = {row["seed"]: row for row in rows if row["label"] == "lora"}
    lines = []
    for label in GRID:
        mine = {row["seed"]: row for row in rows if row["label"] == label}
        if not mine:
            continue
        times = [over_lora[label, seed] for seed in mine if (label, seed) in over_lora]
        each = " ".join(f"{float(row['accuracy']):.4f}" for row in mine.values())
        cells = [label, each, f"{statistics.mean(float(row['accuracy']) for row in mine.values()):.4f}"]
        cells += [*compare(mine, lora), f"{statistics.mean(times):.3f}" if times else "-"]
        cells += [
            f"{statistics.mean(float(row[name]) for row in mine.values()):.3f}" for name in ("sparsity", "speedup")
        ]
        lines.append(f"| {' | '.join(cells)} |")
    header = "| run | accuracy, each seed | mean | over LoRA | points | 95 % interval | CPU s over LoRA | sparsity "
    return [f"{header}| speed-up |", "|" + "---|" * 9, *lines] if lines else []
