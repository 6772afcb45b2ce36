"""The tables of a run: what it scored, what is left of the model, what it cost, and its events."""

from dataclasses import dataclass
from typing import Any

from apt.records import Event
from apt.runs.report.records import RunRecord, known_scores

Rows = list[tuple[str, ...]]


@dataclass(frozen=True)
class Sheet:
    """A table as text, for the terminal and for the page."""

    title: str
    headers: tuple[str, ...]  # none: names and values
    rows: Rows
    words: int = 1  # columns of text in front of the numbers


def sheets(run: RunRecord) -> list[Sheet]:
    """What the terminal shows: results, events, and what each event saved, where there were any."""
    rows = score_rows(run) + size_rows(run) + efficiency_rows(run)
    found = [Sheet(f"{run.folder}: {run.metrics.get('method', '')}", (), rows)]
    if run.events:
        found.append(events_sheet(run.events))
        found += repairs_sheet(run.events)
    if run.timings.get("events"):
        found.append(timings_sheet(run.timings))
    return found


def score_rows(run: RunRecord) -> Rows:
    """Each score, the one that counts first."""
    metrics = run.metrics
    if "test_questions" in metrics:
        metrics = {**metrics, "test_size": metrics["test_questions"], "unit": "questions"}
    of = f"{metrics.get('test_size', 0):,} {metrics.get('unit', 'sentences')}"
    names = sorted(known_scores(), key=lambda name: name != metrics.get("metric"))
    rows = [(f"{name} on {of}", f"{metrics[name]:.4f}") for name in names if name in metrics and name != "perplexity"]
    if "perplexity" in metrics:
        rows.append((f"perplexity on {metrics.get('test_tokens', 0):,} tokens", f"{metrics['perplexity']:.3f}"))
    return list(rows)


def size_rows(run: RunRecord) -> Rows:
    """What was asked for, and what is left of the model."""
    metrics = run.metrics
    rows: list[tuple[str, str | None]] = []
    if metrics.get("ablation", "full") != "full":
        rows.append(("ablation", metrics["ablation"]))
    if metrics.get("target_speedup") is not None:
        rows.append(("speed-up asked", f"{metrics['target_speedup']:.2f}"))
        rows.append(("speed-up predicted by the latency table", number(metrics.get("predicted_speedup"), ".2f")))
    else:
        rows.append(("sparsity asked", number(metrics.get("target_sparsity"), ".1%")))
    rows.append(("sparsity reached", number(metrics.get("sparsity"), ".1%")))
    rows.append(("parameters before", number(metrics.get("params_before"), ",")))
    rows.append(("parameters after", number(metrics.get("params_after"), ",")))
    active = metrics.get("active_gates")
    if active:
        rows.append((f"ranks or gates in use, of {len(active)} layers", f"{sum(active.values()):,.1f}"))
    taught = metrics.get("self_distillation")
    if taught:
        taken = ", ".join(map(str, taught["teacher_of_steps"]))
        steps = f"{taught['first_step']} to {taught['last_step']}, teacher of {taken}"
        rows.append(("self-distillation, steps", steps))
    return [(name, value) for name, value in rows if value is not None]


def efficiency_rows(run: RunRecord) -> Rows:
    """What training took, and how fast the model answers."""
    metrics = run.metrics
    since = metrics.get("resumed_from_step")
    shape = metrics.get("latency_shape")
    words = f" ({shape[0]} x {shape[1]} tokens)" if shape else ""
    training = "training, s" + (f" (from step {since} on)" if since else "")
    rows: Rows = [(training, number(metrics.get("train_seconds"), ".1f"))]
    rows.append(("tokens/s before the first event", number(metrics.get("tokens_per_s_before"), ",.0f")))
    rows.append(("tokens/s after the last event", number(metrics.get("tokens_per_s_after"), ",.0f")))
    if run.peak_mb is not None:
        rows.append(("peak memory of training, MB", f"{run.peak_mb:,.0f}"))
    rows.append((f"inference dense, ms{words}", number(metrics.get("latency_ms_dense"), ".1f")))
    rows.append((f"inference small, ms{words}", number(metrics.get("latency_ms_small"), ".1f")))
    if "generation_shape" in metrics:
        prompts, length, made = metrics["generation_shape"]
        for name in ("dense", "small"):
            label = f"generated tokens/s {name} ({prompts} x {length} + {made} tokens)"
            rows.append((label, number(metrics.get(f"generated_per_s_{name}"), ",.1f")))
    if metrics.get("latency_ms_dense") and metrics.get("latency_ms_small"):
        ratio = metrics["latency_ms_dense"] / metrics["latency_ms_small"]
        rows.append(("inference dense over small", f"{ratio:.2f}"))
    return rows


def events_sheet(events: list[Event]) -> Sheet:
    """One row an event."""
    by_time = any(event.target_speedup is not None for event in events)
    asked = ("speed-up asked", "predicted", "sparsity") if by_time else ("sparsity asked", "reached")
    layers = any(name.endswith(".layers") for event in events if event.prune is not None for name in event.prune.kept)
    kinds = (*(["layers"] if layers else []), "heads", "neurons")
    rows = []
    for event in events:
        speed = number(event.target_speedup, ".2f"), number(event.predicted_speedup, ".2f")
        rows.append(
            (
                str(event.step),
                *(speed if by_time else (number(event.target_sparsity, ".1%"),)),
                f"{event.sparsity:.1%}",
                *(_left(event, kind) for kind in kinds),
                f"{event.trainable_params:,}",
                f"{event.seconds:.2f}",
            )
        )
    return Sheet(
        "Events",
        ("step", *asked, *(f"{kind} left" for kind in kinds), "trainable parameters", "seconds"),
        list(rows),
    )


def _left(event: Event, ending: str) -> str:
    """Units of one kind that an event left, over all layers."""
    if event.prune is None:
        return "-"
    return f"{sum(len(kept) for name, kept in event.prune.kept.items() if name.endswith(ending)):,}"


REPAIRED = "Error of the projections that read what went, over their output, on calibration tokens held out"


def repairs_sheet(events: list[Event]) -> list[Sheet]:
    """One row an event that repaired: how many projections, and their mean error; nothing where none did."""
    rows = []
    for event in events:
        notes = list(event.prune.errors.values()) if event.prune is not None else []
        if notes:
            means = [sum(getattr(note, side) for note in notes) / len(notes) for side in ("before", "after")]
            rows.append((str(event.step), str(len(notes)), *(f"{mean:.4f}" for mean in means)))
    return [Sheet(REPAIRED, ("event at step", "projections", "cut", "repaired"), list(rows))] if rows else []


def repaired_sheet(events: list[Event]) -> list[Sheet]:
    """One row a projection that an event repaired; nothing where none was."""
    rows = [
        (
            str(event.step),
            name,
            f"{note.before:.4f}",
            f"{note.after:.4f}",
            number(note.ridge, ".0e"),
            _share(note.stream),
        )
        for event in events
        if event.prune is not None
        for name, note in (event.prune.repair or {}).items()
    ]
    headers = ("event at step", "units", "cut", "repaired", "ridge", "drift left")
    return [Sheet(REPAIRED, headers, list(rows), words=2)] if rows else []


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def timings_sheet(timings: dict[str, Any]) -> Sheet:
    """What each event saved of a step."""
    shape = f"{timings['sentences']} x {timings['tokens']} tokens"
    title = f"Forward and backward on one batch, {shape}, median of {timings['steps']}"
    headers = ("event at step", "removed", "ms before", "pruned", "faster", "ranks grown", "faster", "MB for backward")
    rows = []
    for row in timings["events"]:
        pruned = number(row.get("ms_pruned"), ".1f"), number(row.get("ratio_pruned"), ".2f")
        after = number(row.get("ms_after"), ".1f"), number(row.get("ratio"), ".2f")
        saved = f"{row['saved_mb_before']:.1f} > {row['saved_mb_pruned']:.1f}" if "saved_mb_before" in row else "-"
        rows.append((str(row["step"]), f"{row['removed']:.1%}", f"{row['ms_before']:.1f}", *pruned, *after, saved))
    return Sheet(title, headers, list(rows))


def number(value: float | None, spec: str) -> str:
    """A number as text; a dash where there is none."""
    return "-" if value is None else format(value, spec)
