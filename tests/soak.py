"""Trains for long in one process and watches what grows: ``python tests/soak.py [--steps 5000] [--events 20]``.

With ``--compile BACKEND`` (eager, inductor) the model is compiled, and 5 MB an event are allowed.

A tiny BERT is pruned and grown, and saved every 500 steps. Resident memory and open descriptors are read ten times in
each half. One line of JSON at the end; the exit code is 1 where the second half grew by more than 5 MB (a line fitted
through its readings) or opened a descriptor that it did not close.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from tiny_run import tiny_bert

import apt

MOST_MB = 5.0
WIDTH, LENGTH = 16, 12


def batches(steps: int) -> Any:
    """A batch a step, of several lengths."""
    draw = torch.Generator().manual_seed(0)
    for step in range(steps):
        length = LENGTH - step % 5
        ids = torch.randint(5, 40, (WIDTH, length), generator=draw)
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 1] % 2}


def soak(steps: int, events: int, folder: Path, backend: str | None = None) -> dict[str, Any]:
    """Train, compiled where a backend is named, and return what was read."""
    torch.set_num_threads(1)
    model = apt.patch_model(tiny_bert(layers=4), target_modules=("q", "v", "up", "down")).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    settings = {"target_sparsity": 0.6, "num_events": events, "prune_end": 0.95, "round_to": 1}
    run = apt.Controller(model, optimizer, steps, event_log=folder / "events.jsonl", **settings)
    called = model if backend is None else torch.compile(model, backend=backend)
    process = psutil.Process(os.getpid())
    seen: list[tuple[int, float, int]] = []
    for step, batch in enumerate(batches(steps), 1):
        run.loss(called(**batch), batch).backward()
        run.after_backward()
        optimizer.step()
        run.after_step()
        optimizer.zero_grad()
        if step % 500 == 0:
            apt.save_checkpoint(run, folder / "checkpoint")
        if step % (steps // 20) == 0:
            seen.append((step, process.memory_info().rss / 1e6, process.num_fds()))
    second = [row for row in seen if row[0] > steps // 2]
    slope = float(np.polyfit([row[0] for row in second], [row[1] for row in second], 1)[0])
    return {
        "steps": steps,
        "events": len(run.events),
        "mb": [round(row[1], 1) for row in seen],
        "descriptors": [row[2] for row in seen],
        "grown_mb": round(slope * (steps - steps // 2), 2),
        "grown_descriptors": second[-1][2] - second[0][2],
    }


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--events", type=int, default=20)
    parser.add_argument("--compile", metavar="BACKEND")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = soak(arguments.steps, arguments.events, Path(folder), arguments.compile)
    print(json.dumps(found))
    # Half of the events fall into the second half of the steps.
    most = MOST_MB if arguments.compile is None else MOST_MB * arguments.events / 2
    grown = found["grown_mb"] > most or found["grown_descriptors"] > 0
    return 1 if grown or found["events"] != arguments.events else 0


if __name__ == "__main__":
    sys.exit(main())
