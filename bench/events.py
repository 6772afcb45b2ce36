"""What each event is worth at once: a training step right before it and right after it.

``python -m bench.events [--shape minilm] [--runs 12]``

A short run with five events, with and without a teacher, ranks held and growing. Two trainings of one seed, one of
which waits before each event, take the same step (forward, loss, backward, statistics, optimizer) in turns. Saved for
backward: the distinct storages that autograd keeps of one step, parameters left out. At the first event both have the
teacher, which a run asks from then on. Rows: bench/results/cpu/events.csv.
"""

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import apt
from apt.training.controller.distillation import Stage
from bench.contestants import LEARNING_RATE, RANK, SCALE
from bench.plan import results
from bench.rows import append_rows, environment, quantiles, read_rows
from bench.shapes import SHAPES
from bench.timing import Clock

EVENTS, APART = 5, 6  # events, and optimizer steps from one to the next
LEAST = 0.03  # of the block parameters: events that remove less are listed and not judged
MODES = {  # label: overrides of the method
    "ranks held": {"adaptive_rank_update": False},
    "ranks held, teacher": {"adaptive_rank_update": False, "use_self_distillation": True},
    "ranks grow": {},
    "ranks grow, teacher": {"use_self_distillation": True},
}


@dataclass
class Training:
    """A model in training: everything that a step needs."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    run: apt.Controller
    batch: Mapping[str, Tensor]

    def step(self) -> None:
        """One optimizer step, up to the point where the controller would act."""
        self.run.loss(self.model(**self.batch), self.batch).backward()
        self.run.after_backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def saved_bytes(self) -> int:
        """Bytes of the distinct storages that autograd keeps for the backward pass of one step."""
        own = {p.untyped_storage().data_ptr() for p in [*self.model.parameters(), *self.model.buffers()]}
        kept: dict[int, tuple[int, Tensor]] = {}  # the tensors are held, or a later one could take a freed address

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = (storage.nbytes(), tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = self.run.loss(self.model(**self.batch), self.batch)
        loss.backward()
        self.optimizer.zero_grad()
        return sum(size for size, _ in kept.values())

    def parameter_bytes(self) -> int:
        """Bytes of the storages of all parameters, each once."""
        storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in self.model.parameters()}
        return sum(storages.values())


def begin(shape: str, mode: str, sparsity: float) -> Training:
    """A training at its start: the same one each time."""
    size = SHAPES[shape]
    model = apt.patch_model(size.model(), rank=RANK, scale=SCALE, target_modules=size.targets).train()
    batch, total = size.inputs(model), EVENTS * APART
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    settings: dict[str, Any] = {"distill_end": total + 1, **MODES[mode]}
    run = apt.Controller(
        model, optimizer, total + 1, num_events=EVENTS, prune_start=0, prune_end=total, target_sparsity=sparsity,
        **settings,
    )  # fmt: skip
    return Training(model, optimizer, run, batch)


def events(shape: str, mode: str, sparsity: float) -> Iterator[tuple[Training, Training]]:
    """Before each event two trainings of one seed, of which the second has gone through it."""
    before, after = begin(shape, mode, sparsity), begin(shape, mode, sparsity)
    for step in range(1, EVENTS * APART + 1):
        for training in (before, after):
            training.step()
        after.run.after_step()
        if step % APART == 0:
            if before.run.distillation is not None:
                before.run.distillation.stage = Stage.TEACHING
                before.run.distillation.after_step(step)  # from here on the hidden states of the student are caught
            yield before, after
        before.run.after_step()


def measure(shape: str, mode: str, sparsity: float, runs: int) -> list[dict[str, Any]]:
    """A row an event."""
    rows = []
    for before, after in events(shape, mode, sparsity):
        event = after.run.events[-1]
        pair = {"before": before, "after": after}
        row: dict[str, Any] = {"shape": shape, "mode": mode, "sparsity": sparsity, "event": len(after.run.events)}
        row |= {"removed": round(event.removed, 4), "event_seconds": round(event.seconds, 3)}
        for name, training in pair.items():
            row[f"saved_mb_{name}"] = round(training.saved_bytes() / 1e6, 3)
            row[f"parameters_mb_{name}"] = round(training.parameter_bytes() / 1e6, 3)
        clock = Clock(torch.device("cpu"), runs=runs, seconds=600.0, warmup=1)
        times = clock.interleaved({name: [training.step] for name, training in pair.items()})
        row |= {f"ms_{name}": round(times[name].median, 2) for name in pair}
        ratios = [b / a for b, a in zip(times["before"].device_ms, times["after"].device_ms, strict=True)]
        row |= {"faster": round(quantiles(ratios)[1], 4), "runs": len(ratios)}
        rows.append(row | environment())
        print(*(f"{key}={value}" for key, value in row.items()), flush=True)
    return rows


def missed(row: dict[str, str]) -> list[str]:
    """What an event did not make smaller: bytes kept for backward, time of a step, bytes of parameters."""
    wanted = ["saved_mb", "ms", *([] if "teacher" in row["mode"] else ["parameters_mb"])]  # a teacher keeps them
    return [key for key in wanted if not float(row[f"{key}_after"]) < float(row[f"{key}_before"])]


def table(rows: list[dict[str, str]]) -> str:
    """One line an event; what is judged and did not shrink is marked."""
    lines = [
        "| mode | event | removed | saved for backward, MB | parameters, MB | step, ms | faster | event, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        judged = float(row["removed"]) >= LEAST and "held" in row["mode"]
        larger = missed(row) if judged else []
        cells = [f"{row[f'{key}_before']} -> {row[f'{key}_after']}" for key in ("saved_mb", "parameters_mb", "ms")]
        mark = f" **not smaller: {', '.join(larger)}**" if larger else ""
        lines.append(
            f"| {row['mode']} | {row['event']} | {float(row['removed']):.1%} | {' | '.join(cells)} "
            f"| {float(row['faster']):.2f}{mark} | {row['event_seconds']} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=list(SHAPES), default="minilm")
    parser.add_argument("--sparsity", type=float, default=0.6)
    parser.add_argument("--runs", type=int, default=12, help="timed steps of each copy")
    parser.add_argument("--only", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--out", type=Path, default=results("events"))
    arguments = parser.parse_args()
    for mode in arguments.only:
        if any((row["shape"], row["mode"]) == (arguments.shape, mode) for row in read_rows(arguments.out)):
            continue
        append_rows(arguments.out, measure(arguments.shape, mode, arguments.sparsity, arguments.runs))
    text = table(read_rows(arguments.out))
    arguments.out.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
