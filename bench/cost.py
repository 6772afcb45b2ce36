"""What each part of the method costs alone, and how that grows: ``python -m bench.cost [--parts step gate ...]``.

``step`` takes a training step of a MiniLM-shaped encoder (random weights, AdamW) in turns: without statistics, with
gates and salience, while masks fall (which plans every step), and with a teacher. Every other part is timed at growing
sizes; the slope of log(time) over log(size) says whether it stays linear, and a steeper one is reported. Rows go to
bench/results/cpu/cost.csv, the table beside it is drawn from them.
"""

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import apt
import apt_kernels
from apt.families import anatomy_of
from apt.pruning import PruningConfig, UnitSearch
from apt.pruning.salience import unit_scores
from apt.pruning.units import block_params
from apt.records import PrunePlan
from apt.surgery.prune import apply_prune_plan
from apt.training.checkpoint import save_controller
from bench import against, plan
from bench.contestants import NEVER, TAUGHT, controlled_step
from bench.rows import append_rows, environment, quantiles, read_rows
from bench.search import groups
from bench.timing import Clock
from bench.turns import TURNS

TOKENS, BATCH, FEATURES = 27, 32, 1536  # of the demo's middling batch
KEY = ("part", "axis", "size")  # what a row is about
HARDLY = 0.01  # sparsity of a student that is as slow as its teacher
STEEP = 1.15  # a slope above this is worse than linear beyond what small sizes explain
Case = tuple[str, float, Callable[[], Callable[[], object]]]  # axis, size, and what makes a call ready to be timed once


def encoder(layers: int = 6) -> nn.Module:
    """A classifier of the shape of MiniLM, with random weights."""
    torch.manual_seed(0)
    shape = {"hidden_size": 384, "num_hidden_layers": layers, "num_attention_heads": 12, "intermediate_size": 1536}
    return BertForSequenceClassification(BertConfig(**shape))


def sentences(batch: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 30000, (batch, TOKENS), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2}


def training_step(total_steps: int, warm: int, **settings: Any) -> Callable[[], None]:
    """One optimizer step of a run of its own that has done `warm` steps."""
    model = apt.patch_model(encoder(), target_modules=("q", "v", "up", "down")).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    run = apt.Controller(model, optimizer, total_steps, **settings)
    step = controlled_step(run, model, sentences(BATCH), optimizer)
    for _ in range(warm):
        step()
    return step


def step_rows(runs: int) -> list[dict[str, Any]]:
    """A step without statistics, with them, and while masks fall; ratios are of the paired medians."""
    long, never = 1_000_000, 10_000_000
    calls = {
        "no statistics": training_step(never, 0, num_events=0, target_sparsity=0.0),
        "gates and salience": training_step(never, 0, num_events=1, prune_start=0, prune_end=0.5),
        "masks fall": training_step(long, 2, num_events=1, prune_start=0, prune_end=long, decay=long - 1, settle=0),
        "teacher": training_step(never, 3, target_sparsity=HARDLY, **TAUGHT),
    }
    times = Clock(torch.device("cpu"), runs=runs, seconds=math.inf).interleaved({k: [c] for k, c in calls.items()})
    plain = times["no statistics"]
    rows = []
    for name, measured in times.items():
        row = {"part": "step", "axis": name, "size": BATCH * TOKENS, "ratio": measured.over(plain)}
        rows.append(row | _ms(measured))
    return rows


def _ms(times: Any) -> dict[str, Any]:
    p20, p50, p80 = quantiles(times.device_ms)
    return {"ms_p20": round(p20, 3), "ms_p50": round(p50, 3), "ms_p80": round(p80, 3), "runs": len(times.device_ms)}


def gate_cases() -> Iterator[Case]:
    """Forward and backward of a collecting gate, over tokens and over width."""
    for axis, tokens, width in [("tokens", t, 2048) for t in (512, 2048, 8192)] + [
        ("width", 1024, w) for w in (1024, 4096, 13824)
    ]:

        def make(tokens: int = tokens, width: int = width) -> Callable[[], object]:
            h, dy = torch.randn(tokens, width, requires_grad=True), torch.randn(tokens, width)
            sums, count = torch.zeros(2, width), torch.zeros(())
            return lambda: apt_kernels.gate(h, None, sums=sums, count=count).backward(dy)

        yield axis, tokens if axis == "tokens" else width, make


def salience_cases() -> Iterator[Case]:
    """Scores of every unit, over layers of a 13B shape."""
    for layers in (10, 20, 40):
        found = groups(layers, device="cpu")
        yield "layers", layers, lambda found=found: lambda: [unit_scores(group) for group in found]


def search_cases() -> Iterator[Case]:
    """One plan, over layers and neurons, up to the 13B shape."""
    for axis, layers, neurons in [("layers", n, 13824) for n in (10, 20, 40)] + [
        ("neurons", 40, n) for n in (3456, 6912, 13824)
    ]:
        found = groups(layers, neurons)
        total = sum(group.num_units * group.cost() for group in found)
        draw = torch.Generator().manual_seed(0)
        scores = {group.name: torch.rand(group.num_units, generator=draw) for group in found}
        plan = UnitSearch(total, PruningConfig()).plan

        def make(found: Any = found, scores: Any = scores, total: int = total, plan: Any = plan) -> Any:
            return lambda: plan(found, scores, total, step=1, sparsity=0.5)

        yield axis, layers if axis == "layers" else neurons, make


def decoder(width: int, layers: int = 1) -> nn.Module:
    """Llama layers of a width in bfloat16, with 13B's proportions."""
    heads, neurons = width // 128, int(width * 2.7) // 128 * 128
    shape = {"hidden_size": width, "num_attention_heads": heads, "intermediate_size": neurons, "vocab_size": 32}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=layers)).to(torch.bfloat16)
    return apt.patch_model(model.to_empty(device="cpu"))


def surgery_cases() -> Iterator[Case]:
    """Removal of half the heads and neurons of one layer, over its parameters, up to the layer of a 13B model."""
    for width in (1280, 2560, 5120):
        model = decoder(width)
        heads, neurons = apt.summary(model).heads[0], apt.summary(model).neurons[0]
        kept = {"layers.0.heads": list(range(0, heads, 2)), "layers.0.neurons": list(range(0, neurons, 2))}
        plan = PrunePlan(step=1, target_sparsity=0.5, kept=kept, round_to=1)
        size = block_params(anatomy_of(model))
        del model

        def make(width: int = width, plan: PrunePlan = plan) -> Callable[[], object]:
            whole = decoder(width)
            return lambda: apply_prune_plan(whole, plan)

        yield "parameters of the layer", size, make


def checkpoint_cases() -> Iterator[Case]:
    """Writing the controller's state, over layers."""
    for layers in (8, 16, 32):
        model = decoder(256, layers)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        run = apt.Controller(model, optimizer, 1000)

        def make(run: apt.Controller = run) -> Callable[[], object]:
            folder = tempfile.TemporaryDirectory()
            return lambda: (save_controller(run, Path(folder.name)), folder)

        yield "layers", layers, make


def distillation_cases() -> Iterator[Case]:
    """The teacher's pass and the losses of a batch, over layers and tokens; the student lost next to nothing."""
    for axis, layers, batch in [("layers", n, 8) for n in (3, 6, 12)] + [("tokens", 6, n) for n in (8, 16, 32)]:
        model = apt.patch_model(encoder(layers), target_modules=("q", "v", "up", "down")).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        run = apt.Controller(model, optimizer, NEVER, target_sparsity=HARDLY, **TAUGHT)
        given = sentences(batch)
        step = controlled_step(run, model, given, optimizer)
        while not run.events:
            step()

        def make(model: nn.Module = model, run: apt.Controller = run, given: Any = given) -> Callable[[], object]:
            output = model(**given)
            return lambda: run.loss(output, given)

        yield axis, layers if axis == "layers" else batch * TOKENS, make


CASES = {
    "gate": gate_cases,
    "salience": salience_cases,
    "search": search_cases,
    "surgery": surgery_cases,
    "distillation": distillation_cases,
    "checkpoint": checkpoint_cases,
}


def part_rows(part: str, runs: int) -> list[dict[str, Any]]:
    """Every size of one part; the last row of each axis has the slope of its fit."""
    rows: list[dict[str, Any]] = []
    for axis, size, make in CASES[part]():
        seconds = []
        for _ in range(runs + 1):
            TURNS.change()
            call = make()
            started = time.perf_counter()
            call()
            seconds.append(1e3 * (time.perf_counter() - started))
        p20, p50, p80 = (round(value, 3) for value in quantiles(seconds[1:]))  # the first one warms up
        rows.append(
            {"part": part, "axis": axis, "size": size, "ms_p20": p20, "ms_p50": p50, "ms_p80": p80, "runs": runs}
        )
    for axis in dict.fromkeys(row["axis"] for row in rows):
        mine = [row for row in rows if row["axis"] == axis]
        mine[-1]["slope"] = round(slope([row["size"] for row in mine], [row["ms_p50"] for row in mine]), 3)
    return rows


def slope(sizes: list[float], times: list[float]) -> float:
    """The exponent e of the least-squares fit ``time = c size^e``."""
    return float(np.polyfit(np.log(sizes), np.log(times), 1)[0])


def table(rows: list[dict[str, str]]) -> str:
    """Markdown of the latest row of each part, axis and size."""
    latest = {(row["part"], row["axis"], row["size"]): row for row in rows}
    lines = ["| part | over | size | ms | of a plain step | grows as size to the |", "|---|---|---|---|---|---|"]
    for row in latest.values():
        grows = row.get("slope") or ""
        worse = " (worse than linear)" if grows and float(grows) > STEEP else ""
        size = f"{float(row['size']):,.0f}"
        lines.append(
            f"| {row['part']} | {row['axis']} | {size} | {row['ms_p50']} | {row.get('ratio') or ''} | {grows}{worse} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=["step", *CASES], default=["step", *CASES])
    parser.add_argument("--runs", type=int, default=15, help="timed runs of each case")
    parser.add_argument("--out", type=Path, default=plan.results("cost"))
    against.add_option(parser)
    plan.add_options(parser)
    arguments = parser.parse_args()
    if arguments.against:
        print(against.compare("bench.cost", KEY, arguments.against, sys.argv[1:]))
        return
    torch.set_num_threads(1)
    for part in (unit["part"] for unit in plan.todo([{"part": part} for part in arguments.parts], arguments)):
        rows = step_rows(arguments.runs) if part == "step" else part_rows(part, min(arguments.runs, 7))
        append_rows(arguments.out, [row | environment() for row in rows])
        for row in rows:
            if row.get("slope", 0.0) > STEEP:
                print(f"{part} over {row['axis']}: worse than linear, size to the {row['slope']}", flush=True)
    text = table(read_rows(arguments.out))
    arguments.out.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
