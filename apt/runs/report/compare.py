"""A folder of runs: what each scored and cost, and how that compares with full fine-tuning and with LoRA."""

from dataclasses import dataclass
from typing import Any

from apt.runs.report.pictures import GREY, INK, SERIES, Picture, draw, legend
from apt.runs.report.records import RunRecord
from apt.runs.report.tables import Sheet, number

BASELINES = {"full": "full fine-tuning", "lora": "LoRA"}  # method of an unpruned run -> what others are compared with
MARKERS = "osD^vP"
LABELLED = 40  # points; more of them would hide each other's numbers


@dataclass(frozen=True)
class Quantity:
    """A number of a run that is compared."""

    key: str
    name: str
    unit: str
    spec: str
    one: float = 1.0  # of that unit


QUANTITIES = (
    Quantity("score", "score", "", ".4f"),
    Quantity("train_seconds", "training", " s", ",.1f"),
    Quantity("peak_mb", "peak", " MB", ",.0f"),
    Quantity("latency_ms_small", "inference", " ms", ",.1f"),
    Quantity("throughput", "inputs/s", "", ",.1f"),
    Quantity("params_after", "parameters", " M", ",.1f", 1e6),
)


def value(run: RunRecord, key: str) -> float | None:
    """A quantity of a run; None where it was not recorded."""
    metrics = run.metrics
    if key == "score":
        return None if run.metric is None else metrics.get(run.metric)
    if key == "peak_mb":
        return run.peak_mb
    if key == "throughput":
        shape, ms = metrics.get("latency_shape"), metrics.get("latency_ms_small")
        return 1e3 * shape[0] / ms if shape and ms else None
    return metrics.get(key)


def comparisons(runs: list[RunRecord]) -> list[Sheet]:
    """All runs, then the same as a multiple of each baseline that lies among them."""
    ordered = list(enumerate(runs, start=1))
    metrics = sorted({run.metric or "-" for run in runs})
    score = metrics[0] if len(metrics) == 1 else "score"
    headers = (score, *(quantity.name + quantity.unit for quantity in QUANTITIES[1:]))
    rows = [
        (*_names(index, run), number(run.metrics.get("seed"), ""), *(_amount(run, quantity) for quantity in QUANTITIES))
        for index, run in ordered
    ]
    found = [Sheet("Runs", ("no.", "run", "method", "sparsity", "seed", *headers), list(rows), words=3)]
    for method, words in BASELINES.items():
        relative = [
            (*_names(index, run), *(_ratio(run, bases, quantity.key) for quantity in QUANTITIES))
            for index, run in ordered
            if (bases := baselines_of(run, runs, method))
        ]
        if relative:
            names = ("no.", "run", "method", "sparsity", score, *(quantity.name for quantity in QUANTITIES[1:]))
            found.append(Sheet(f"The same, with {words} as 1", names, list(relative), words=3))
    return found


def _amount(run: RunRecord, quantity: Quantity) -> str:
    amount = value(run, quantity.key)
    return "-" if amount is None else format(amount / quantity.one, quantity.spec)


def _names(index: int, run: RunRecord) -> tuple[str, str, str, str]:
    ablation = run.metrics.get("ablation") or "full"
    method = str(run.metrics.get("method") or "-") + ("" if ablation == "full" else f" {ablation}")
    return str(index), run.label, method, number(run.metrics.get("sparsity"), ".1%")


def is_baseline(run: RunRecord) -> bool:
    """Whether it is full fine-tuning or LoRA of the whole model."""
    return run.metrics.get("method") in BASELINES and not run.metrics.get("sparsity")


def baselines_of(run: RunRecord, runs: list[RunRecord], method: str) -> list[RunRecord]:
    """The runs that one is compared with: same model, data and score, and its own seed where there is such a run."""

    def kind(other: RunRecord) -> tuple[Any, ...]:
        return other.metrics.get("model"), other.metrics.get("data"), other.metric

    found = [r for r in runs if is_baseline(r) and r.metrics.get("method") == method and kind(r) == kind(run)]
    same_seed = [other for other in found if other.metrics.get("seed") == run.metrics.get("seed")]
    return same_seed or found


def _ratio(run: RunRecord, bases: list[RunRecord], key: str) -> str:
    """A quantity over the mean of the baselines."""
    ours, theirs = value(run, key), [value(base, key) for base in bases]
    known = [number for number in theirs if number is not None]
    mean = sum(known) / len(known) if known else 0.0
    return "-" if ours is None or not mean else f"{ours / mean:.3f}"


def trade_offs(runs: list[RunRecord]) -> list[Picture | str]:
    """Score against the time of a forward pass, one picture for each model, data set and score."""
    groups: dict[tuple[str, str, str], list[tuple[int, RunRecord]]] = {}
    for index, run in enumerate(runs, start=1):
        if value(run, "score") is not None and value(run, "latency_ms_small") is not None:
            key = str(run.metrics.get("model")), str(run.metrics.get("data")), str(run.metric)
            groups.setdefault(key, []).append((index, run))
    if not groups:
        return ["Not recorded: no run has both a score and a time of inference."]
    return [_trade_off(number, *key, of_group) for number, (key, of_group) in enumerate(groups.items(), start=1)]


def _trade_off(place: int, model: str, data: str, metric: str, runs: list[tuple[int, RunRecord]]) -> Picture:
    methods = list(dict.fromkeys(str(run.metrics.get("method")) for _, run in runs))

    def plot(axes: Any) -> None:
        for order, method in enumerate(methods):
            marker, colour = MARKERS[order % len(MARKERS)], SERIES[order % len(SERIES)]
            ours = [run for _, run in runs if str(run.metrics.get("method")) == method]
            x, y = ([value(run, key) for run in ours] for key in ("latency_ms_small", "score"))
            axes.plot(x, y, marker, color=colour, markersize=6, label=BASELINES.get(method, method))
            marked = [run for run in ours if is_baseline(run)]
            x, y = ([value(run, key) for run in marked] for key in ("latency_ms_small", "score"))
            axes.plot(x, y, "o", mfc="none", color=INK, markersize=11, markeredgewidth=0.8)
        for index, run in runs if len(runs) <= LABELLED else ():
            spot = value(run, "latency_ms_small"), value(run, "score")
            axes.annotate(str(index), spot, textcoords="offset points", xytext=(7, 4), fontsize=8)
        for base in (run for _, run in runs if is_baseline(run)):
            axes.axhline(value(base, "score"), color=GREY, linewidth=0.7, linestyle=(0, (2, 2)), zorder=0.5)
        axes.margins(0.12)
        axes.set_xlabel("inference, ms", loc="right")
        axes.set_ylabel(metric)
        legend(axes)

    alt = f"{metric} against inference time of {len(runs)} runs of {model} on {data}; baselines are ringed."
    return draw(f"trade_off_{place}", f"{metric} against inference time", alt, plot, height=3.3)
