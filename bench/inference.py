"""Answers of a pruned model against the dense one: latency, throughput, FLOPs: ``python -m bench.inference``.

Each model goes through what a user would deploy: pruned by random scores, exported, loaded again. The dense model with
a LoRA merged, the same with PEFT's LoRA beside its weights, and exports of both layouts answer in turns, at batch 1 and
32. Encoders take one forward pass; what writes is timed with its first pass and new tokens with the cache, decoders at
their first pass (prefill) too. One row each in bench/results/cpu/inference.csv; the table beside it is drawn from them.
"""

import argparse
import copy
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import apt
from bench import against, plan
from bench.contestants import RANK, SCALE, peft_model, prune
from bench.rows import append_rows, environment, quantiles, read_rows
from bench.shapes import SHAPES, Shape
from bench.timing import Clock

NEW_TOKENS = 16
SPARSITIES = (0.3, 0.6, 0.8)
BATCHES = (1, 32)
KEY = ("shape", "phase", "batch", "model")  # what a row is about


def deployed(shape: Shape, sparsity: float, layout: str) -> nn.Module:
    """A pruned model of a shape after export and loading."""
    model = apt.patch_model(shape.model(), rank=RANK, scale=SCALE, target_modules=shape.targets, layout=layout)
    prune(model, sparsity)
    with tempfile.TemporaryDirectory() as folder:
        apt.export_model(model, Path(folder) / "model")
        return apt.load_model(Path(folder) / "model").eval()


def models(shape: Shape) -> dict[str, nn.Module]:
    """Everything that answers, by name; "dense" is the model before training, which a merged LoRA equals in cost."""
    dense = shape.model().eval()
    found = {"dense, or LoRA merged": dense, "PEFT LoRA, not merged": peft_model(copy.deepcopy(dense), shape.targets)}
    for sparsity in SPARSITIES:
        for layout in ("free", "uniform"):
            found[f"apt {sparsity:.0%} {layout}"] = deployed(shape, sparsity, layout)
    return {name: model.eval() for name, model in found.items()}


def works(shape: Shape, model: nn.Module, batch: int, device: str) -> dict[str, Callable[[], object]]:
    """What is timed: by the name of the phase."""
    config: Any = model.config
    size = (batch, shape.tokens)
    ids = torch.randint(5, config.vocab_size, size, generator=torch.Generator().manual_seed(0)).to(device)
    mask = torch.ones_like(ids)
    if not shape.language_model and not config.is_encoder_decoder:
        return {"forward": lambda: model(input_ids=ids, attention_mask=mask)}
    generate: Any = model.generate
    settings = {"do_sample": False, "use_cache": True, "pad_token_id": 0, "eos_token_id": None}
    settings |= {"attention_mask": mask, "min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS}
    writes: dict[str, Callable[[], object]] = {f"prefill and {NEW_TOKENS} tokens": lambda: generate(ids, **settings)}
    if config.is_encoder_decoder:  # its first pass is the encoder's, which is no answer yet
        return writes
    return {"prefill": lambda: model(input_ids=ids, attention_mask=mask, use_cache=True)} | writes


def measure(name: str, runs: int) -> list[dict[str, Any]]:
    """Rows of one shape."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape, rows = SHAPES[name], []
    contestants = {key: model.to(device) for key, model in models(shape).items()}
    for batch in BATCHES:
        calls = {key: works(shape, model, batch, device) for key, model in contestants.items()}
        for phase in next(iter(calls.values())):
            with torch.inference_mode():
                clock = Clock(torch.device(device), runs=runs, seconds=90.0)
                times = clock.interleaved({key: [work[phase]] for key, work in calls.items()})
            dense, dense_flop = next(iter(times.values())), 0.0
            for key, measured in times.items():
                flop = _gflop(calls[key][phase])
                dense_flop = dense_flop or flop
                p20, p50, p80 = (round(value, 3) for value in quantiles(measured.device_ms))
                row: dict[str, Any] = {"what": "inference", "shape": name, "layers": shape.layers, "phase": phase}
                row |= {"batch": batch, "tokens": shape.tokens, "model": key, "runs": len(measured.device_ms)}
                row |= {"ms_p20": p20, "ms_p50": p50, "ms_p80": p80, "sequences_per_s": round(1e3 * batch / p50, 2)}
                row |= {"speedup": dense.over(measured), "gflop": flop, "flop_ratio": round(dense_flop / flop, 4)}
                rows.append(row | {"params": sum(p.numel() for p in contestants[key].parameters())})
    return [row | environment() for row in rows]


def _gflop(call: Callable[[], object]) -> float:
    """Matrix products only."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        call()
    return round(counter.get_total_flops() / 1e9, 4)


def table(rows: list[dict[str, str]]) -> str:
    """The latest row of each model, with its share of the speed-up that its FLOPs would allow."""
    latest = {(row["shape"], row["device"], row["phase"], row["batch"], row["model"]): row for row in rows}
    lines = []
    for key in dict.fromkeys(key[:2] for key in latest):
        lines += [
            f"**{key[0]}**, {key[1]}",
            "",
            "| | | batch | ms | sequences/s | times dense | FLOPs allow | share |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in (row for other, row in latest.items() if other[:2] == key):
            faster, allowed = float(row["speedup"]), float(row["flop_ratio"])
            lines.append(
                f"| {row['model']} | {row['phase']} | {row['batch']} | {float(row['ms_p50']):.1f} "
                f"| {row['sequences_per_s']} | {faster:.2f} | {allowed:.2f} | {faster / allowed:.0%} |"
            )
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["minilm", "smollm2-135m"])
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--out", type=Path, default=plan.results("inference"))
    against.add_option(parser)
    plan.add_options(parser)
    arguments = parser.parse_args()
    if arguments.against:
        print(against.compare("bench.inference", KEY, arguments.against, sys.argv[1:]))
        return
    for unit in plan.todo([{"shape": shape} for shape in arguments.shapes], arguments):
        append_rows(arguments.out, measure(unit["shape"], arguments.runs))
    text = table(read_rows(arguments.out))
    arguments.out.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
