"""Time of one plan: the search over every head, neuron and hidden dimension of a 13B decoder, on one CPU core.

``python -m bench.search`` appends one row to bench/results/cpu/search.csv. The modules hold no weights (meta device).
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from apt.families import Layer, PlacedPart
from apt.families.hidden_parts import HiddenPart
from apt.families.llama import LLAMA
from apt.layers import APTAdapter
from apt.layers.hidden import HiddenMask
from apt.layers.passes import ValidTokens
from apt.layers.unit_mask import UnitMask
from apt.pruning import PruningConfig, UnitSearch
from apt.pruning.dimensions import Group, HiddenGroup
from apt.pruning.units import Member, UnitGroup
from bench.plan import results
from bench.rows import append_row, environment, quantiles

LAYERS, HEADS, HEAD_DIM, NEURONS = 40, 40, 128, 13824  # LLaMA-13B
HIDDEN = HEADS * HEAD_DIM
SPARSITY = 0.5


def groups(layers: int = LAYERS, neurons: int = NEURONS, device: str = "meta") -> list[UnitGroup]:
    """Heads and neurons of every layer, at full size; the gates' statistics lie on the device."""
    valid, found, (stack,) = ValidTokens(), [], LLAMA.stacks
    for index in range(layers):
        layer = Layer(stack, index, f"layers.{index}", nn.Identity())
        for part, units, width, reads in ((stack.parts[0], HEADS, HEAD_DIM, 3), (stack.parts[1], neurons, 1, 2)):
            gate = UnitMask(units, width, valid, torch.device(device), kind=part.kind)
            read = [Member(linear(HIDDEN, units * width), "out", width) for _ in range(reads)]
            members = (*read, Member(linear(units * width, HIDDEN), "in", width))
            found.append(UnitGroup(PlacedPart(layer, part), gate, members))
    return found


def with_dimensions(units: list[UnitGroup]) -> list[Group]:
    """The hidden dimensions beside them: the other side of every linear."""
    parts = [
        HiddenPart(
            group.name, member.linear, "linear", ("in" if member.axis == "out" else "out",), layer=group.part.layer
        )
        for group in units
        for member in group.members
    ]
    return [*units, HiddenGroup(HiddenMask(HIDDEN, 1, torch.device("meta")), tuple(parts), floor=8)]


def linear(num_in: int, num_out: int) -> APTAdapter:
    return APTAdapter(nn.Linear(num_in, num_out, bias=False, device="meta"))


def measure(repeats: int, hidden: bool = False, **settings: Any) -> dict[str, Any]:
    """Seconds of a plan, with the counts it came to."""
    plain = groups()
    total = sum(group.num_units * group.cost() for group in plain)
    units: list[Group] = with_dimensions(plain) if hidden else [*plain]
    draw = torch.Generator().manual_seed(0)
    scores = {group.name: torch.rand(group.num_units, generator=draw) for group in units}
    pruner = UnitSearch(total, PruningConfig(target_sparsity=SPARSITY, **settings))
    pruner.check(units, total)
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        plan = pruner.plan(units, scores, total, step=1, sparsity=SPARSITY)
        seconds.append(time.perf_counter() - started)
    gone = HIDDEN - len(plan.kept.get("hidden", range(HIDDEN)))
    left = sum(len(plan.kept[group.name]) * (group.cost() - gone * group.slope()) for group in plain)
    assert SPARSITY <= 1.0 - left / total <= SPARSITY + 1e-3, "the plan misses its budget"
    p20, p50, p80 = quantiles(seconds[1:])  # the first one warms up
    row = {"what": "search", "layers": LAYERS, "heads": HEADS, "neurons": NEURONS, "sparsity": SPARSITY}
    row |= {"dimensions": HIDDEN if hidden else 0, **settings}
    return row | {"s_p20": round(p20, 4), "s_p50": round(p50, 4), "s_p80": round(p80, 4), "runs": repeats}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--round-to", type=int, default=8)
    parser.add_argument("--hidden", action="store_true", help="prune hidden dimensions too")
    parser.add_argument("--out", type=Path, default=results("search"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    row = measure(arguments.repeats, arguments.hidden, round_to=arguments.round_to)
    append_row(arguments.out, row | environment())
    print(f"{row['s_p50']} s a plan at round_to={arguments.round_to} (p20 {row['s_p20']}, p80 {row['s_p80']})")


if __name__ == "__main__":
    main()
