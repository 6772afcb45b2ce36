"""Folders as finished runs leave them, made of a few rows: for the tests of the report."""

from pathlib import Path
from typing import Any

from apt.files.whole import append_jsonl, write_json
from apt.records import Event, PrunePlan, RankPlan

METRICS: dict[str, Any] = {
    "method": "apt",
    "accuracy": 0.8265,
    "f1": 0.81,
    "test_size": 2000,
    "target_sparsity": 0.6,
    "sparsity": 0.6042,
    "params_before": 22713986,
    "params_after": 16200000,
    "train_seconds": 251.34,  # this and what follows stand in efficiency.json; an older run has one file
    "tokens_per_s_before": 3456.7,
    "tokens_per_s_after": 8910.2,
    "latency_ms_dense": 301.26,
    "latency_ms_small": 125.5,
    "latency_shape": [32, 64],
}


def write_metrics(folder: Path, metrics: dict[str, Any]) -> None:
    """As a run does: what a clock says goes into a file of its own."""
    names = list(METRICS)
    times = {name: metrics[name] for name in names[names.index("train_seconds") :]}
    write_json(folder / "efficiency.json", times)
    write_json(folder / "metrics.json", {name: value for name, value in metrics.items() if name not in times})


def run_folder(folder: Path, metrics: dict[str, Any], events: int = 2, timings: bool = True) -> Path:
    """A run from before there were steps and shapes."""
    write_json(folder / "metrics.json", metrics)
    for i in range(events):
        kept = {"layers.0.heads": [0, 1], "layers.0.cross_heads": [3], "layers.0.neurons": list(range(1200 - 8 * i))}
        plan = PrunePlan(step=i, target_sparsity=0.3, kept=kept, round_to=8)
        counts = {"block_params": 10, "trainable_params": 345678, "seconds": 0.25}
        row = Event(step=40 + i, prune=plan, rank=None, target_sparsity=0.3, sparsity=0.31, removed=0.31, **counts)
        append_jsonl(folder / "events.jsonl", row.to_json())
    if timings:
        row = {"step": 40, "removed": 0.31, "ms_before": 200.0, "ms_after": 125.0, "ratio": 1.6}
        row |= {"ms_pruned": 100.0, "ratio_pruned": 2.0, "saved_mb_before": 91.5, "saved_mb_pruned": 63.2}
        write_json(folder / "event_timing.json", {"sentences": 32, "tokens": 29, "steps": 10, "events": [row]})
    return folder


def short_run(folder: Path, **metrics: Any) -> Path:
    """A run that left its numbers and one logged step: few pictures."""
    settings = {"metric": "accuracy", "model": "tiny", "data": "rows.csv", "seed": 0}
    write_metrics(folder, METRICS | settings | metrics)
    append_jsonl(folder / "steps.jsonl", {"step": 2, "loss": 0.5, "peak_mb": 532.5})
    return folder


def whole_run(folder: Path, **metrics: Any) -> Path:
    """A run with everything recorded: two layers, one event, a teacher, hidden dimensions, an adapter in each role."""
    settings = {"metric": "accuracy", "model": "tiny", "data": "rows.csv", "steps": 20, "seed": 0, "device": "cpu"}
    write_metrics(folder, METRICS | settings | {"versions": {"torch": "2.0"}} | metrics)
    (folder / "config.yaml").write_text("training:\n  seed: 0\n", encoding="utf-8")
    before = {"hidden": 32} | {f"layers.{i}.{kind}": n for i in range(2) for kind, n in (("heads", 4), ("neurons", 64))}
    after = {name: count // 2 for name, count in before.items()}
    names = {f"m.layer.{i}.{role}": ["layers", i, role] for i in range(2) for role in ("q", "v", "up", "down")}
    shape = {"step": 0, "units": before, "ranks": dict.fromkeys(names, 8), "adapter_params": 4000}
    append_jsonl(folder / "shapes.jsonl", {**shape, "event": False, "places": names})
    quantiles = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
    salience = {kind: {"kept": [2 * q for q in quantiles], "removed": quantiles} for kind in ("heads", "neurons")}
    row = {"step": 10, "units": after, "ranks": dict.fromkeys(names, 11), "adapter_params": 7000}
    append_jsonl(folder / "shapes.jsonl", {**row, "event": True, "salience": salience})
    kept = {name: list(range(count)) for name, count in after.items()}
    prune = PrunePlan(step=10, target_sparsity=0.5, kept=kept, round_to=8)
    rank = RankPlan(step=10, budget=8000, ranks=row["ranks"])
    counts = {"block_params": 10, "trainable_params": 7100, "seconds": 0.25}
    event = Event(step=10, prune=prune, rank=rank, target_sparsity=0.5, sparsity=0.52, removed=0.52, **counts)
    append_jsonl(folder / "events.jsonl", event.to_json())
    for step in range(2, 21, 2):
        gone = 0.52 if step >= 10 else 0.0
        row = {"step": step, "loss": 1.0 / step, "task_loss": 0.9 / step, "distill_loss": 0.1 / step, "steps": 2}
        row |= {"seconds": 0.4, "tokens": 800, "tokens_per_s": 2000.0, "sparsity": gone, "planned_sparsity": 0.5}
        append_jsonl(folder / "steps.jsonl", row | {"memory_mb": 400.0 + step, "peak_mb": 512.5 + step})
    append_jsonl(folder / "steps.jsonl", {"step": 10, "eval_accuracy": 0.71})
    append_jsonl(folder / "steps.jsonl", {"step": 20, "eval_accuracy": 0.83})
    return folder
