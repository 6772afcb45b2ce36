"""Finished runs of a grid -> the tables of the paper, means over the seeds, and the numbers behind its figures."""

import csv
import io
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from apt.files.telling import markdown, tell
from apt.files.whole import write_text
from apt.runs.report import report
from apt.runs.report.compare import QUANTITIES, Quantity, value
from apt.runs.report.records import RunRecord, load_run
from apt.runs.report.tables import number

RUNS, ARMS, TABLES = "runs.csv", "tradeoff.csv", "tables.md"
BASELINES = ("full", "lora")  # arms that others are given as a percentage of
BETTER_SMALL = ("train_seconds", "peak_mb", "latency_ms_small", "params_after")
WORDS = {"train_seconds": "train time", "peak_mb": "train memory", "latency_ms_small": "inference time"}
WORDS |= {"params_after": "parameters"}


@dataclass(frozen=True)
class Arm:
    """All seeds of one way to run."""

    name: str
    runs: list[RunRecord]

    def values(self, key: str) -> list[float]:
        """A quantity of each run that has it."""
        return [found for run in self.runs if (found := value(run, key)) is not None]

    def mean(self, key: str) -> float | None:
        return statistics.mean(found) if (found := self.values(key)) else None

    def over(self, base: "Arm", key: str) -> float | None:
        """The ratio of the means over the seeds that both have."""
        seeds = {run.metrics.get("seed") for run in base.runs}
        ours = Arm(self.name, [run for run in self.runs if run.metrics.get("seed") in seeds])
        mine = {run.metrics.get("seed") for run in ours.runs}
        theirs = Arm(base.name, [run for run in base.runs if run.metrics.get("seed") in mine])
        above, below = ours.mean(key), theirs.mean(key)
        return None if above is None or not below else above / below


def collect(folder: Path, runs: Iterable[Path]) -> None:
    """Write ``runs.csv``, ``tradeoff.csv`` and ``tables.md`` of a grid, and its pages; a corrupt run is left out."""
    read = []
    for run in runs:
        try:
            read.append(load_run(run))
        except ValueError as error:
            tell(f"left out: {error}")
    arms = arms_of(read)
    _write_csv(folder / RUNS, ["run", "seed", *_keys()], [_run_row(run) for arm in arms for run in arm.runs])
    _write_csv(folder / ARMS, ["arm", *_keys(), *_relative_keys(arms)], [_arm_row(arm, arms) for arm in arms])
    write_text(folder / TABLES, tables(arms))
    report(folder)


def arms_of(runs: list[RunRecord]) -> list[Arm]:
    """The runs by their name without the seed, in the order in which they come."""
    found: dict[str, list[RunRecord]] = {}
    for run in runs:
        found.setdefault(run.label.rpartition("-seed")[0], []).append(run)
    return [Arm(name, of) for name, of in found.items()]


def tables(arms: list[Arm]) -> str:
    """Markdown: relative to each baseline (Tables 2 and 3 of the paper), as measured (11, 12), ablations (4, 5, 10)."""
    metric = next((run.metric for arm in arms for run in arm.runs if run.metric), "score")
    parts = [_relative(arms, base, metric) for base in arms if base.name in BASELINES]
    parts.append(_measured(arms, metric))
    ablated = [arm for arm in arms if arm.runs[0].metrics.get("ablation") not in (None, "full")]
    if ablated:
        parts.append(_ablations(arms, ablated, metric))
    return "\n".join(part for part in parts)


def _relative(arms: list[Arm], base: Arm, metric: str) -> str:
    rows = [
        [arm.name, str(len(arm.runs)), _spread(arm), *(_percent(arm.over(base, key)) for key in BETTER_SMALL)]
        for arm in arms
    ]
    headers = ["run", "seeds", metric, *(f"{WORDS[key]}, % of {base.name}" for key in BETTER_SMALL)]
    return _markdown(f"Beside {base.name}", headers, rows)


def _measured(arms: list[Arm], metric: str) -> str:
    quantities = [quantity for quantity in QUANTITIES if quantity.key != "score"]
    rows = [[arm.name, _spread(arm), *(_in_unit(arm.mean(q.key), q) for q in quantities)] for arm in arms]
    headers = ["run", metric, *(f"{q.name},{q.unit}" if q.unit else q.name for q in quantities)]
    return _markdown("As measured", headers, rows)


def _in_unit(mean: float | None, quantity: Quantity) -> str:
    return number(None if mean is None else mean / quantity.one, quantity.spec)


def _ablations(arms: list[Arm], ablated: list[Arm], metric: str) -> str:
    """Each ablation against the whole method at its sparsity; what has no pruning, against the first."""
    whole = [arm for arm in arms if arm.name.startswith("apt-") and arm not in ablated]
    rows = []
    for arm in ablated:
        other = next((w for w in whole if arm.name.startswith(f"{w.name}-")), whole[0] if whole else None)
        if other is None:
            continue
        ours, theirs = arm.mean("score"), other.mean("score")
        change = None if ours is None or theirs is None else 100.0 * (ours - theirs)
        rows.append(
            [arm.name, other.name, _spread(arm), number(change, "+.2f")]
            + [_percent(arm.over(other, key)) for key in ("train_seconds", "peak_mb")]
        )
    headers = ["ablation", "against", metric, "points", "train time, % of it", "train memory, % of it"]
    return _markdown("Ablations", headers, rows)


def _spread(arm: Arm) -> str:
    """Mean of the score and its standard deviation over the seeds."""
    scores = arm.values("score")
    if not scores:
        return "-"
    return f"{statistics.mean(scores):.4f}" + (f" ± {statistics.stdev(scores):.4f}" if len(scores) > 1 else "")


def _percent(ratio: float | None) -> str:
    return "-" if ratio is None else f"{100.0 * ratio:.1f}"


def _markdown(title: str, headers: list[str], rows: list[list[str]]) -> str:
    lines = [f"## {title}", "", f"| {' | '.join(headers)} |", "|" + "---|" * len(headers)]
    return "\n".join([*lines, *(f"| {' | '.join(map(markdown, row))} |" for row in rows)]) + "\n"


def _keys() -> list[str]:
    return ["sparsity", *(quantity.key for quantity in QUANTITIES)]


def _relative_keys(arms: list[Arm]) -> list[str]:
    bases = [arm.name for arm in arms if arm.name in BASELINES]
    return [f"{quantity.key}_over_{base}" for base in bases for quantity in QUANTITIES]


def _run_row(run: RunRecord) -> list[object]:
    return [run.label, run.metrics.get("seed"), *(value(run, key) for key in _keys())]


def _arm_row(arm: Arm, arms: list[Arm]) -> list[object]:
    bases = [other for other in arms if other.name in BASELINES]
    return [arm.name, *map(arm.mean, _keys()), *(arm.over(base, q.key) for base in bases for q in QUANTITIES)]


def _write_csv(path: Path, headers: list[str], rows: list[list[object]]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([headers, *rows])
    write_text(path, text.getvalue())
