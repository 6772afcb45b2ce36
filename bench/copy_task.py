"""A tiny T5 learns from scratch to copy, then half of its layers' parameters go while its adapters train on.

``python -m bench.copy_task [--seeds 0 1 2] [--sparsity 0.5]``, a few minutes a seed on one core.

A source is a sequence of 4 to 8 different symbols, the target the same. The dense model trains in full; the copy of it
that is pruned trains adapters alone, on new sequences. Exact match is the share of 500 held-out sequences that greedy
generation with a cache gives back whole. The pruned model is the exported one. One CSV row a seed; seeds that are there
already are skipped.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apt.families import IGNORED
from bench.plan import results
from bench.rows import append_row, environment, read_rows

PAD, END, SYMBOLS = 0, 1, 30  # ids of padding (and of the decoder's start) and of the end; different symbols
SHORTEST, LONGEST = 4, 8  # symbols of a sequence
BATCH, HELD_OUT = 64, 500
RATE, DENSE_STEPS = 3e-3, 1200
ROUND_TO = 4  # neurons, of 128
CONFIG = {
    "vocab_size": 2 + SYMBOLS,
    "d_model": 64,
    "d_kv": 12,  # 4 heads of it are not d_model
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "relative_attention_num_buckets": 16,
    "relative_attention_max_distance": 16,
    "pad_token_id": PAD,
    "eos_token_id": END,
    "decoder_start_token_id": PAD,
}


def sequences(count: int, draw: torch.Generator) -> dict[str, Tensor]:
    """Sources, their padding mask, and targets: ``[count, LONGEST + 1]``, ended by END."""
    order = torch.rand(count, SYMBOLS, generator=draw).argsort(dim=1)[:, :LONGEST] + 2
    length = torch.randint(SHORTEST, LONGEST + 1, (count, 1), generator=draw)
    place = torch.arange(LONGEST + 1)
    ids = torch.cat([order, order.new_zeros(count, 1)], dim=1).masked_fill(place == length, END)
    mask = (place <= length).long()
    return {
        "input_ids": ids.masked_fill(mask == 0, PAD),
        "attention_mask": mask,
        "labels": ids.masked_fill(mask == 0, IGNORED),
    }


def exact_match(model: Any, batch: dict[str, Tensor]) -> float:
    """Share of sources that greedy generation gives back whole, up to END."""
    model.eval()
    made = model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=LONGEST + 1)
    made = torch.nn.functional.pad(made[:, 1:], (0, LONGEST + 2 - made.shape[1]), value=PAD)
    return float((made == batch["input_ids"]).all(dim=1).double().mean())


def train(model: Any, steps: int, rate: float, draw: torch.Generator, **pruning: Any) -> Any:
    """Train with AdamW, the rate falling linearly to 0; `pruning` holds settings of a controller, if there is any."""
    import apt

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 50) * (1 - step / steps))
    run = apt.Controller(model, optimizer, steps, **pruning) if pruning else None
    model.train()
    for _ in range(steps):
        batch = sequences(BATCH, draw)
        output = model(**batch)
        loss = output.loss if run is None else run.loss(output, batch)
        loss.backward()
        if run is not None:
            run.after_backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        if run is not None:
            run.after_step()
        schedule.step()
        optimizer.zero_grad()
    return model


def dense_model(seed: int, steps: int, draw: torch.Generator) -> Any:
    """The model that learns to copy, from random weights of a seed."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(seed)
    return train(T5ForConditionalGeneration(T5Config(**CONFIG)), steps, RATE, draw)


def held_out_sequences(seed: int) -> dict[str, Tensor]:
    """What exact match is taken on."""
    return sequences(HELD_OUT, torch.Generator().manual_seed(10_000 + seed))


def deployed(model: Any) -> Any:
    """The model that is read from the export of a patched one."""
    import apt

    with tempfile.TemporaryDirectory() as folder:
        return apt.load_model(apt.export_model(model, Path(folder) / "small"))


def run(seed: int, sparsity: float, dense_steps: int = DENSE_STEPS, pruned_steps: int = 800) -> dict[str, Any]:
    """Train, prune, export, load, and compare on the same held-out sequences."""
    import apt

    draw = torch.Generator().manual_seed(seed)
    held_out = held_out_sequences(seed)
    started = time.process_time()
    model = dense_model(seed, dense_steps, draw)
    middle, dense = time.process_time(), exact_match(model, held_out)
    apt.patch_model(model, rank=8, target_modules=("q", "k", "v", "o", "up", "down"))
    train(model, pruned_steps, RATE, draw, target_sparsity=sparsity, round_to=ROUND_TO)
    counts = apt.summary(model)
    pruned = exact_match(deployed(model), held_out)
    return {
        "seed": seed,
        "target_sparsity": sparsity,
        "sparsity": round(counts.sparsity, 4),
        "exact_match_dense": dense,
        "exact_match_pruned": pruned,
        "ratio": round(pruned / dense, 4),
        "params_dense": counts.params_before,
        "params_pruned": counts.params_after,
        "units": " ".join(f"{name}={count}" for name, count in counts.units.items()),
        "dense_steps": dense_steps,
        "pruned_steps": pruned_steps,
        "dense_cpu_seconds": round(middle - started, 1),
        "pruned_cpu_seconds": round(time.process_time() - middle, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--out", type=Path, default=results("copy_task"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for seed in arguments.seeds:
        done = {(row["seed"], row["target_sparsity"]) for row in read_rows(arguments.out)}
        if (str(seed), str(arguments.sparsity)) not in done:
            row = run(seed, arguments.sparsity)
            append_row(arguments.out, row | environment())
            print({key: row[key] for key in ("seed", "sparsity", "exact_match_dense", "exact_match_pruned", "ratio")})


if __name__ == "__main__":
    main()
