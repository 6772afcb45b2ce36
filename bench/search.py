"""Time of one plan: the search over every head and neuron of a 13B decoder, on one CPU core.

``python -m bench.search`` appends one row to bench/results/cpu/search.csv. The modules hold no weights (meta device).
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from apt.adapters import APTAdapter
from apt.gates import MaskGate, ValidTokens
from apt.pruner import AdaptivePruner, PruningConfig
from apt.units import Member, UnitGroup
from bench.rows import append_row, environment, quantiles

LAYERS, HEADS, HEAD_DIM, NEURONS = 40, 40, 128, 13824  # LLaMA-13B
HIDDEN = HEADS * HEAD_DIM
SPARSITY = 0.5


def groups(layers: int = LAYERS, neurons: int = NEURONS, device: str = "meta") -> list[UnitGroup]:
    """Heads and neurons of every layer, at full size; the gates' statistics lie on the device."""
    valid, found = ValidTokens(), []
    for layer in range(layers):
        for kind, units, width, reads in (("head", HEADS, HEAD_DIM, 3), ("neuron", neurons, 1, 2)):
            gate = MaskGate(units, width, valid, torch.device(device))
            read = [Member(linear(HIDDEN, units * width), "out", width) for _ in range(reads)]
            members = (*read, Member(linear(units * width, HIDDEN), "in", width))
            found.append(UnitGroup(f"layers.{layer}.{kind}s", kind, layer, gate, members))
    return found


def linear(num_in: int, num_out: int) -> APTAdapter:
    return APTAdapter(nn.Linear(num_in, num_out, bias=False, device="meta"))


def measure(repeats: int, **settings: Any) -> dict[str, Any]:
    """Seconds of a plan, with the counts it came to."""
    units = groups()
    total = sum(group.num_units * group.cost() for group in units)
    draw = torch.Generator().manual_seed(0)
    scores = {group.name: torch.rand(group.num_units, generator=draw) for group in units}
    pruner = AdaptivePruner(total, PruningConfig(target_sparsity=SPARSITY, **settings))
    pruner.check(units, total)
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        plan = pruner.plan(units, scores, total, step=1, sparsity=SPARSITY)
        seconds.append(time.perf_counter() - started)
    left = sum(len(plan.kept[group.name]) * group.cost() for group in units)
    assert SPARSITY <= 1.0 - left / total <= SPARSITY + 1e-3, "the plan misses its budget"
    p20, p50, p80 = quantiles(seconds[1:])  # the first one warms up
    row = {"what": "search", "layers": LAYERS, "heads": HEADS, "neurons": NEURONS, "sparsity": SPARSITY, **settings}
    return row | {"s_p20": round(p20, 4), "s_p50": round(p50, 4), "s_p80": round(p80, 4), "runs": repeats}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--round-to", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("bench/results/cpu/search.csv"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    row = measure(arguments.repeats, round_to=arguments.round_to)
    append_row(arguments.out, row | environment())
    print(f"{row['s_p50']} s a plan at round_to={arguments.round_to} (p20 {row['s_p20']}, p80 {row['s_p80']})")


if __name__ == "__main__":
    main()
