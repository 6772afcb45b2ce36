"""What changed from step to step, from loss to salience; where nothing was recorded, a sentence that says so."""

from typing import Any

from apt.runs.report.pictures import BLUE, GREEN, GREY, ORANGE, PURPLE, SERIES, Picture, draw, legend, mark_events
from apt.runs.report.records import RunRecord, known_scores
from apt.training.recorder import QUANTILES

NO_STEPS = "Not recorded: the run left no steps.jsonl."
LOSSES = {"loss": BLUE, "task_loss": GREEN, "distill_loss": ORANGE}


def loss(run: RunRecord) -> Picture | str:
    """The loss at the logging steps, and its parts where there was a teacher."""
    if not run.steps:
        return NO_STEPS
    names = [name for name in LOSSES if any(name in row for row in run.steps)]

    def plot(axes: Any) -> None:
        mark_events(axes, _event_steps(run))
        for name in names:
            axes.plot(*_series(run.steps, name), color=LOSSES[name], label=name.replace("_", " "))
        _by_step(axes, "loss")

    first, last = run.steps[0], run.steps[-1]
    alt = f"Loss over steps: {first['loss']:.3f} at step {first['step']}, {last['loss']:.3f} at step {last['step']}."
    return draw("loss", "Loss", alt, plot)


def score(run: RunRecord) -> Picture | str:
    """The scores on the way, and the final one."""
    names = [name for name in known_scores() if any(f"eval_{name}" in row for row in run.scores)]
    if run.metric in names:
        names = [run.metric]
    if not names:
        return (
            "Not recorded: the run took no scores on its way. evaluation.score_steps (or eval_strategy of the "
            "Trainer) has them taken."
        )

    def plot(axes: Any) -> None:
        mark_events(axes, _event_steps(run))
        for name, color in zip(names, SERIES, strict=False):
            axes.plot(*_series(run.scores, f"eval_{name}"), color=color, marker=".", label=name)
            if name in run.metrics and "steps" in run.metrics:
                axes.plot(
                    run.metrics["steps"], run.metrics[name], "*", color=color, markersize=9, label="of the export"
                )
        _by_step(axes, names[0] if len(names) == 1 else "score")

    last = _series(run.scores, f"eval_{names[0]}")
    alt = f"{names[0]} over steps: {last[1][0]:.4f} at step {last[0][0]}, {last[1][-1]:.4f} at step {last[0][-1]}."
    return draw("score", f"Score: {', '.join(names)}", alt, plot)


def sparsity(run: RunRecord) -> Picture | str:
    """What is gone, beside what the schedule asked for."""
    pruned = [event for event in run.events if event.prune is not None]
    if not pruned:
        return "Nothing was pruned."
    end = run.metrics.get("steps") or pruned[-1].step

    def plot(axes: Any) -> None:
        planned = _series(run.steps, "planned_sparsity")
        if not planned[0]:
            asked = [event for event in pruned if event.target_sparsity is not None]
            planned = [event.step for event in asked], [event.target_sparsity or 0.0 for event in asked]
        if planned[0]:
            _percent(axes, planned, color=ORANGE, linestyle="--", marker=None if run.steps else ".", label="plan")
        reached = [0, *(event.step for event in pruned), end], [0.0, *(event.sparsity for event in pruned)]
        reached[1].append(reached[1][-1])
        _percent(axes, reached, color=BLUE, drawstyle="steps-post", label="reached")
        axes.set_ylim(bottom=0.0)
        _by_step(axes, "block parameters gone, %")

    alt = f"Sparsity over steps, in {len(pruned)} events, up to {pruned[-1].sparsity:.1%}."
    return draw("sparsity", "Sparsity", alt, plot)


def budget(run: RunRecord) -> Picture | str:
    """Adapter parameters beside the budget they may fill."""
    planned = [(event.step, event.rank.budget) for event in run.events if event.rank is not None]
    reached = [(row["step"], row["adapter_params"]) for row in run.shapes if "adapter_params" in row]
    if not reached and not planned:
        return "Not recorded: the run left no shapes.jsonl, and no event let ranks grow."
    end = run.metrics.get("steps")

    def plot(axes: Any) -> None:
        mark_events(axes, _event_steps(run))
        if planned:
            steps, numbers = zip(*planned, strict=True)
            axes.plot(steps, [value / 1e3 for value in numbers], "o", mfc="none", color=ORANGE, label="budget")
        if reached:
            rows = [*reached, (end, reached[-1][1])] if end else reached
            steps, numbers = zip(*rows, strict=True)
            thousands = [value / 1e3 for value in numbers]
            axes.plot(steps, thousands, color=BLUE, drawstyle="steps-post", label="reached")
        axes.set_ylim(bottom=0.0)
        _by_step(axes, "adapter parameters, thousands")

    filled = f"{reached[-1][1]:,} at the end" if reached else f"a budget of {planned[-1][1]:,} at the end"
    return draw("budget", "Rank budget", f"Adapter parameters over steps: {filled}.", plot)


def hidden(run: RunRecord) -> Picture | str:
    """Hidden dimensions that are left."""
    kept = [(row["step"], row["units"]["hidden"]) for row in run.shapes if "hidden" in row["units"]]
    if not kept:
        kept = [(e.step, len(e.prune.kept["hidden"])) for e in run.events if e.prune and "hidden" in e.prune.kept]
    if not kept:
        return "No hidden dimension was up for pruning (unit_types)."
    rows = [*kept, (run.metrics.get("steps") or kept[-1][0], kept[-1][1])]

    def plot(axes: Any) -> None:
        steps, counts = zip(*rows, strict=True)
        axes.plot(steps, counts, color=PURPLE, drawstyle="steps-post")
        axes.set_ylim(bottom=0)
        _by_step(axes, "hidden dimensions")

    return draw("hidden", "Hidden dimensions kept", f"From {kept[0][1]} to {kept[-1][1]} hidden dimensions.", plot)


def step_time(run: RunRecord) -> Picture | str:
    """Milliseconds of an optimizer step."""
    rows = [{"step": row["step"], "ms": 1e3 * row["seconds"] / row["steps"]} for row in run.steps if row.get("steps")]
    if not rows:
        return NO_STEPS

    def plot(axes: Any) -> None:
        mark_events(axes, _event_steps(run))
        axes.plot(*_series(rows, "ms"), color=BLUE)
        axes.set_ylim(bottom=0.0)
        _by_step(axes, "ms an optimizer step")

    alt = f"Time of an optimizer step: {rows[0]['ms']:.0f} ms at first, {rows[-1]['ms']:.0f} ms at the end."
    return draw("step_time", "Step time", alt, plot)


def throughput(run: RunRecord) -> Picture | str:
    """Tokens per second in training."""
    if not any(row.get("tokens_per_s") for row in run.steps):
        return NO_STEPS

    def plot(axes: Any) -> None:
        mark_events(axes, _event_steps(run))
        axes.plot(*_series(run.steps, "tokens_per_s"), color=GREEN)
        axes.set_ylim(bottom=0.0)
        _by_step(axes, "tokens/s, padding included")

    steps, speeds = _series(run.steps, "tokens_per_s")
    alt = f"Tokens per second: {speeds[0]:,.0f} at step {steps[0]}, {speeds[-1]:,.0f} at step {steps[-1]}."
    return draw("throughput", "Throughput of training", alt, plot)


def memory(run: RunRecord) -> Picture | str:
    """Memory in use."""
    steps, used = _series(run.steps, "memory_mb")
    if not steps:
        return NO_STEPS
    peaks = _series(run.steps, "peak_mb")

    def plot(axes: Any) -> None:
        mark_events(axes, _event_steps(run))
        axes.plot(steps, used, color=BLUE, label="in use")
        axes.plot(*peaks, color=GREY, linewidth=1.0, label="peak so far")
        axes.set_ylim(bottom=0.0)
        _by_step(axes, "MB")

    alt = f"Memory over steps: {used[0]:,.0f} MB at first, {used[-1]:,.0f} MB at the end, peak {max(peaks[1]):,.0f} MB."
    return draw("memory", "Memory of training", alt, plot)


def salience(run: RunRecord) -> list[Picture | str]:
    """How the salience of each kind of units was spread before each event: of those that stayed, of those that went."""
    rows = [row for row in run.shapes if row.get("salience")]
    kinds = dict.fromkeys(kind for row in rows for kind in row["salience"])
    if not kinds:
        return [
            "Not recorded: no salience in shapes.jsonl; units may have been scored without data, or before training."
        ]
    return [
        _spread(kind, [(row["step"], row["salience"][kind]) for row in rows if kind in row["salience"]])
        for kind in kinds
    ]


def _spread(kind: str, rows: list[tuple[int, dict[str, list[float]]]]) -> Picture:
    """Boxes: the middle half and the median; whiskers from 5 to 95 %."""
    low, left, middle, right, high = (QUANTILES.index(value) for value in (0.05, 0.25, 0.5, 0.75, 0.95))

    def plot(axes: Any) -> None:
        for offset, side, color in ((-0.18, "removed", ORANGE), (0.18, "kept", BLUE)):
            boxes, places = [], []
            for place, (_, sides) in enumerate(rows):
                values = sides.get(side) or []
                if len(values) == len(QUANTILES):
                    ends = {"whislo": values[low], "q1": values[left], "med": values[middle]}
                    boxes.append({**ends, "q3": values[right], "whishi": values[high]})
                    places.append(place + offset)
            if boxes:
                line: dict[str, Any] = {"color": color, "linewidth": 1.0}
                look: dict[str, Any] = {"showfliers": False, "patch_artist": True, "manage_ticks": False, "widths": 0.3}
                look |= {"boxprops": {"facecolor": color, "edgecolor": color, "alpha": 0.55}}
                look |= {"medianprops": line | {"linewidth": 2.0}, "whiskerprops": line, "capprops": line}
                axes.bxp(boxes, positions=places, **look)
                axes.plot([], [], color=color, linewidth=6, alpha=0.6, label=side)
        smallest = [value for _, sides in rows for values in sides.values() for value in values if value > 0.0]
        if smallest:
            axes.set_yscale("log")
        axes.set_xticks(range(len(rows)), [str(step) for step, _ in rows])
        axes.set_xlabel("event at step")
        axes.set_ylabel("salience of a unit")
        legend(axes)

    words = kind.replace("_", " ")
    alt = f"Salience of {words} before each of {len(rows)} events, of those that stayed and of those that went."
    return draw(f"salience_{kind}", f"Salience of {words}", alt, plot)


def _event_steps(run: RunRecord) -> list[int]:
    return [event.step for event in run.events]


def _series(rows: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    there = [row for row in rows if row.get(name) is not None]
    return [row["step"] for row in there], [row[name] for row in there]


def _percent(axes: Any, series: tuple[list[int], list[float]], **style: Any) -> None:
    axes.plot(series[0], [100.0 * value for value in series[1]], **style)


def _by_step(axes: Any, label: str) -> None:
    axes.set_xlabel("optimizer step", loc="right")
    axes.set_ylabel(label)
    legend(axes)
