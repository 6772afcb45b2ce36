"""What a run left behind -> tables in the terminal. A function of the run's folder alone."""

import json
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.table import Table

from apt.records import Event, read_jsonl

METRICS, EVENTS, TIMINGS = "metrics.json", "events.jsonl", "event_timing.json"
SCORES = ("accuracy", "f1", "matthews", "pearson", "spearman", "mse", "rouge1", "rouge2", "rougeL", "exact_match")
WIDTH = 100  # columns, where the output is no terminal and so has no width


def print_report(folder: str | Path, file: IO[str] | None = None) -> None:
    """Print the tables of a run: results, events, and what each event saved, where there were any.

    Args:
        folder: of a finished run.
        file: None is the standard output.

    Raises:
        FileNotFoundError: the folder holds no finished run.
        ValueError: a file in it is corrupt.
    """
    console = Console(file=file)
    if not console.is_terminal:
        console = Console(file=file, width=WIDTH)
    for table in tables(Path(folder)):
        console.print(table)


def tables(folder: Path) -> list[Table]:
    """The tables of a run, as `print_report` shows them."""
    path = folder / METRICS
    if not path.exists():
        raise FileNotFoundError(f"report: {folder} holds no finished run; it has no {METRICS}")
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        rows = read_jsonl(folder / EVENTS) if (folder / EVENTS).exists() else []
        events = [Event.from_json(row) for row in rows]
        timings = json.loads((folder / TIMINGS).read_text(encoding="utf-8")) if (folder / TIMINGS).exists() else {}
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"report: a record in {folder} is corrupt ({error}); run the training again") from None
    found = [_results(metrics, folder)]
    if events:
        found.append(_events(events))
    if timings.get("events"):
        found.append(_timings(timings))
    return found


def _results(metrics: dict[str, Any], folder: Path) -> Table:
    table = Table(title=f"{folder}: {metrics.get('method', '')}", title_justify="left", show_header=False)
    table.add_column("what")
    table.add_column("value", justify="right")
    if "test_questions" in metrics:
        metrics = {**metrics, "test_size": metrics["test_questions"], "unit": "questions"}
    of = f"{metrics.get('test_size', 0):,} {metrics.get('unit', 'sentences')}"
    for name in sorted(SCORES, key=lambda name: name != metrics.get("metric")):
        if name in metrics:
            table.add_row(f"{name} on {of}", f"{metrics[name]:.4f}")
    if "perplexity" in metrics:
        table.add_row(f"perplexity on {metrics['test_tokens']:,} tokens", f"{metrics['perplexity']:.3f}")
    if metrics.get("ablation", "full") != "full":
        table.add_row("ablation", metrics["ablation"])
    if metrics.get("target_speedup") is not None:
        table.add_row("speed-up asked", f"{metrics['target_speedup']:.2f}")
        table.add_row("speed-up predicted by the latency table", _number(metrics["predicted_speedup"], ".2f"))
    else:
        table.add_row("sparsity asked", f"{metrics['target_sparsity']:.1%}")
    table.add_row("sparsity reached", f"{metrics['sparsity']:.1%}")
    table.add_row("parameters before", f"{metrics['params_before']:,}")
    table.add_row("parameters after", f"{metrics['params_after']:,}")
    if metrics.get("self_distillation"):
        taught = metrics["self_distillation"]
        taken = ", ".join(map(str, taught["teacher_of_steps"]))
        table.add_row(
            "self-distillation, steps", f"{taught['first_step']} to {taught['last_step']}, teacher of {taken}"
        )
    since = metrics.get("resumed_from_step")
    table.add_row("training, s" + (f" (from step {since} on)" if since else ""), f"{metrics['train_seconds']:.1f}")
    table.add_row("tokens/s before the first event", _number(metrics["tokens_per_s_before"], ",.0f"))
    table.add_row("tokens/s after the last event", _number(metrics["tokens_per_s_after"], ",.0f"))
    shape = metrics.get("latency_shape")
    shape = f" ({shape[0]} x {shape[1]} tokens)" if shape else ""
    table.add_row(f"inference dense, ms{shape}", f"{metrics['latency_ms_dense']:.1f}")
    table.add_row(f"inference small, ms{shape}", f"{metrics['latency_ms_small']:.1f}")
    if "generation_shape" in metrics:
        prompts, length, made = metrics["generation_shape"]
        for name in ("dense", "small"):
            label = f"generated tokens/s {name} ({prompts} x {length} + {made} tokens)"
            table.add_row(label, f"{metrics[f'generated_per_s_{name}']:,.1f}")
    table.add_row("inference dense over small", f"{metrics['latency_ms_dense'] / metrics['latency_ms_small']:.2f}")
    return table


def _events(events: list[Event]) -> Table:
    by_time = any(event.target_speedup is not None for event in events)
    asked = ("speed-up asked", "predicted", "sparsity") if by_time else ("sparsity asked", "reached")
    table = _numbers("Events", "step", *asked, "heads left", "neurons left", "trainable parameters", "seconds")
    for event in events:
        speed = _number(event.target_speedup, ".2f"), _number(event.predicted_speedup, ".2f")
        table.add_row(
            str(event.step),
            *(speed if by_time else (_number(event.target_sparsity, ".1%"),)),
            f"{event.sparsity:.1%}",
            _left(event, "heads"),
            _left(event, "neurons"),
            f"{event.trainable_params:,}",
            f"{event.seconds:.2f}",
        )
    return table


def _left(event: Event, ending: str) -> str:
    """Units of one kind that an event left, over all layers."""
    if event.prune is None:
        return "-"
    return f"{sum(len(kept) for name, kept in event.prune.kept.items() if name.endswith(ending)):,}"


def _timings(timings: dict[str, Any]) -> Table:
    shape = f"{timings['sentences']} x {timings['tokens']} tokens"
    title = f"Forward and backward on one batch, {shape}, median of {timings['steps']}"
    headers = ("ms before", "pruned", "faster", "ranks grown", "faster", "MB for backward")
    table = _numbers(title, "event at step", "removed", *headers)
    for row in timings["events"]:
        pruned = f"{row['ms_pruned']:.1f}", f"{row['ratio_pruned']:.2f}"
        after = f"{row['ms_after']:.1f}", f"{row['ratio']:.2f}"
        saved = f"{row['saved_mb_before']:.1f} > {row['saved_mb_pruned']:.1f}" if "saved_mb_before" in row else "-"
        table.add_row(str(row["step"]), f"{row['removed']:.1%}", f"{row['ms_before']:.1f}", *pruned, *after, saved)
    return table


def _numbers(title: str, *headers: str) -> Table:
    table = Table(title=title, title_justify="left")
    for header in headers:
        table.add_column(header, justify="right")
    return table


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)
