"""One step of each way to fine-tune: time, memory, FLOPs: ``python -m bench.train_step [--shapes minilm ...]``.

Random weights, forward, backward and AdamW step. Every contestant runs in a process of its own: first alone, for its
peak memory, then in turns with PEFT's LoRA and with the frozen model (forward and input gradient only: the limit of any
adapter), so that a noisy machine touches all three alike. Outputs are compared with the plain model's before anything
is timed. One row each in bench/results/cpu/train_step.csv, or where --out says; the table beside it is drawn from them.
"""

import argparse
import copy
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench import against, plan
from bench.contestants import CONTESTANTS, Contestant, frozen, peft_lora
from bench.memory import PeakMemory
from bench.rows import append_row, environment, quantiles, read_rows
from bench.shapes import SHAPES
from bench.timing import Clock
from bench.turns import TURNS

KEY = ("shape", "layers", "dtype", "contestant")  # what a row is about
REFERENCE, LIMIT = "peft lora", "frozen"
CLOSE = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # of the largest logit
SECONDS = 60.0
EXACT = ("full", "peft lora", "apt lora", "apt 0%")  # start as the plain model


def measure(
    shape: str, name: str, runs: int, dtype: torch.dtype, layers: int | None, seconds: float = SECONDS
) -> dict[str, Any]:
    """The row of one contestant, here and now, from so many turns, or what `seconds` allow."""
    chosen, device = SHAPES[shape], "cuda" if torch.cuda.is_available() else "cpu"
    plain = chosen.model(layers).to(dtype)
    batch = chosen.inputs(plain, device)
    parameters = sum(p.numel() for p in plain.parameters())

    with PeakMemory() as peak:
        mine = CONTESTANTS[name](copy.deepcopy(plain).to(device), batch, chosen.targets)
        if name.startswith(EXACT):
            _compare(name, plain, mine.model, batch, CLOSE[dtype])
        for _ in range(3):
            mine.step()
    rivals = {
        name: mine,
        REFERENCE: peft_lora(copy.deepcopy(plain).to(device), batch, chosen.targets),
        LIMIT: frozen(copy.deepcopy(plain).to(device), batch, chosen.targets),
    }
    if name == REFERENCE:
        rivals = {REFERENCE: mine, LIMIT: rivals[LIMIT]}
    times = Clock(torch.device(device), runs=runs, seconds=seconds).interleaved(
        {k: [c.step] for k, c in rivals.items()}
    )
    own, theirs, limit = (times[key] for key in (name, REFERENCE, LIMIT))
    p20, p50, p80 = (round(value, 3) for value in quantiles(own.device_ms))
    tokens = chosen.batch * chosen.tokens
    row: dict[str, Any] = {"what": "train_step", "shape": shape, "contestant": name, "dtype": str(dtype)[6:]}
    row |= {"layers": layers or chosen.layers, "of_layers": chosen.of, "batch": chosen.batch, "tokens": chosen.tokens}
    row |= {"ms_p20": p20, "ms_p50": p50, "ms_p80": p80, "runs": len(own.device_ms)}
    row |= {"tokens_per_s": round(1e3 * tokens / p50, 1)}
    row |= {"over_peft": own.over(theirs), "over_limit": own.over(limit), "params": parameters}
    row |= {"peak_mb": round(peak.mb, 1), "reserved_mb": round(peak.reserved_mb, 1), "gflop": _gflop(mine)}
    return row | environment()


def _compare(name: str, plain: nn.Module, mine: nn.Module, batch: Mapping[str, Tensor], close: float) -> None:
    training = mine.training
    with torch.no_grad():  # labels too: an encoder-decoder makes its decoder's input of them
        theirs = plain.to(batch["input_ids"].device).eval()(**batch).logits
        apart = (mine.eval()(**batch).logits - theirs).abs().max().item()
        plain.cpu()
        mine.train(training)
    if apart > close * max(1.0, theirs.abs().max().item()):
        raise RuntimeError(f"{name} differs from the plain model by {apart:.1e}, so its time means nothing")


def _gflop(contestant: Contestant) -> float:
    """Of one step, matrix products only; 0 where kernels or a compiler hide them."""
    with FlopCounterMode(display=False) as counter:
        contestant.step()
    return round(counter.get_total_flops() / 1e9, 3)


def in_order(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Shape by shape, contestant by contestant, what is no longer measured last; rows of one kind stay as they came."""
    places = {name: place for names in (SHAPES, CONTESTANTS) for place, name in enumerate(names)}
    return sorted(rows, key=lambda row: [places.get(row[key], len(places)) for key in ("shape", "contestant")])


def table(rows: list[dict[str, str]]) -> str:
    """The latest row of each contestant, shape by shape; what is slower than PEFT is marked."""
    kinds = ("shape", "layers", "dtype", "device", "contestant")
    latest = {tuple(row[key] for key in kinds): row for row in in_order(rows)}
    lines = []
    for key in dict.fromkeys(key[:4] for key in latest):
        mine = [row for other, row in latest.items() if other[:4] == key]
        reference = next((float(row["peak_mb"]) for row in mine if row["contestant"] == REFERENCE), None)
        first = mine[0]
        layers = f"{key[1]} of {first['of_layers']} layers"
        lines += [
            f"**{key[0]}**, {layers}, {first['batch']} x {first['tokens']} tokens, {key[2]}, {key[3]}",
            "",
            "| | ms | over PEFT | of the limit's speed | tokens/s | peak MB | over PEFT | GFLOP |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in mine:
            memory = f"{float(row['peak_mb']) / reference:.3f}" if reference else "-"
            slower = " (slower)" if row["contestant"].startswith("apt") and float(row["over_peft"]) > 1.0 else ""
            limit = f"{1.0 / float(row['over_limit']):.3f}"
            lines.append(
                f"| {row['contestant']} | {float(row['ms_p50']):.1f} | {float(row['over_peft']):.3f}{slower} | {limit} "
                f"| {float(row['tokens_per_s']):,.0f} | {float(row['peak_mb']):,.0f} | {memory} | {row['gflop']} |"
            )
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--contestants", nargs="+", choices=list(CONTESTANTS), default=list(CONTESTANTS))
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="at most, for the turns of a contestant")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--layers", type=int, help="instead of the shape's own number")
    parser.add_argument("--out", type=Path, default=plan.results("train_step"))
    parser.add_argument("--one", action="store_true", help="measure the first contestant here and print its row")
    against.add_option(parser)
    plan.add_options(parser)
    arguments = parser.parse_args()
    if arguments.against:
        print(against.compare("bench.train_step", KEY, arguments.against, sys.argv[1:]))
        return
    if arguments.one:
        dtype = getattr(torch, arguments.dtype)
        row = measure(
            arguments.shapes[0], arguments.contestants[0], arguments.runs, dtype, arguments.layers, arguments.seconds
        )
        print("ROW " + json.dumps(row), flush=True)
        return
    TURNS.give()  # each contestant's process takes its own
    layers = {shape: str(arguments.layers or SHAPES[shape].layers) for shape in arguments.shapes}
    units = [
        {"shape": shape, "contestant": name, "dtype": arguments.dtype, "layers": layers[shape]}
        for shape in arguments.shapes
        for name in arguments.contestants
    ]
    for unit in plan.todo(units, arguments):
        shape, name = unit["shape"], unit["contestant"]
        command = [sys.executable, "-m", "bench.train_step", "--one", "--shapes", shape, "--contestants", name]
        command += ["--runs", str(arguments.runs), "--seconds", str(arguments.seconds)]
        command += ["--dtype", arguments.dtype, "--layers", unit["layers"]]
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        found = [line[4:] for line in finished.stdout.splitlines() if line.startswith("ROW ")]
        if not found:
            print(f"{shape}, {name}: failed, {finished.stderr.strip().splitlines()[-1:]}", flush=True)
            continue
        row = json.loads(found[0])
        append_row(arguments.out, row)
        print(f"{shape}, {name}: {row['ms_p50']} ms, {row['over_peft']} of PEFT, {row['peak_mb']} MB", flush=True)
    text = table(read_rows(arguments.out))
    arguments.out.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
