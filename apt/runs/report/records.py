"""Reads what a run left in its folder. What is not there is empty; what is broken is one clear error."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from apt.files.reading import UnreadableError, is_finite_number, parse_yaml, read_json_table, read_text, shown
from apt.files.whole import read_jsonl
from apt.records import Event
from apt.runs.run_folder import CONFIG, EFFICIENCY, EVENTS, METRICS, TIMINGS
from apt.runs.tasks import TASKS
from apt.training.recorder import SHAPES, STEPS

# The entries of metrics.json that are text.
WORDS = ("method", "ablation", "model", "data", "metric", "unit", "device")
TABLES = ("versions", "self_distillation", "active_gates")
LISTS = {"latency_shape": 2, "generation_shape": 3}  # how many numbers


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A finished run, as its folder tells it."""

    folder: Path
    label: str  # what it is called in tables and titles
    metrics: dict[str, Any]  # of metrics.json, and of efficiency.json, which an older run has in the first
    events: list[Event]
    timings: dict[str, Any]  # of the events; {} where none was timed
    steps: list[dict[str, Any]]  # rows at logging steps
    scores: list[dict[str, Any]]  # rows of scores on the way
    shapes: list[dict[str, Any]]  # at the start and after each event
    config: str  # YAML; "" where it is not there

    @property
    def metric(self) -> str | None:
        """The score that counts, by name."""
        named: str | None = self.metrics.get("metric")
        if named is not None:
            return named
        return next((name for name in known_scores() if name in self.metrics), None)

    @property
    def peak_mb(self) -> float | None:
        """The highest memory that training was seen to use, in 10^6 bytes."""
        return max((row["peak_mb"] for row in self.steps if row.get("peak_mb") is not None), default=None)


def known_scores() -> list[str]:
    """The metrics of all tasks, each once."""
    names = (name for task in TASKS.values() for name in task.metrics)
    return list(dict.fromkeys(names))


def load_run(folder: Path, label: str | None = None) -> RunRecord:
    """Everything there is of a run; it is called `label`, or as its folder is.

    Raises:
        FileNotFoundError: the folder holds no finished run.
        ValueError: a record in it is corrupt; the message names the file.
    """
    if not (folder / METRICS).exists():
        raise FileNotFoundError(f"report: {folder} holds no finished run; it has no {METRICS}")
    rows = [_check_numbers(folder / STEPS, row) for row in _rows(folder / STEPS)]
    return RunRecord(
        folder=folder,
        label=folder.resolve().name if label is None else label,
        metrics=(_metrics(folder / EFFICIENCY) if (folder / EFFICIENCY).exists() else {}) | _metrics(folder / METRICS),
        events=_events(folder / EVENTS),
        timings=_timings(folder / TIMINGS),
        steps=[row for row in rows if "loss" in row],
        scores=[row for row in rows if "loss" not in row],
        shapes=[_check_shape(folder / SHAPES, row) for row in _rows(folder / SHAPES)],
        config=_config(folder / CONFIG),
    )


def find_runs(folder: Path) -> list[Path]:
    """Folders of finished runs inside a folder, at any depth, by name; those that are still written are left out."""
    found = (path.parent for path in folder.rglob(METRICS))
    return sorted(run for run in found if not _unfinished(run.relative_to(folder)))


def _unfinished(path: Path) -> bool:
    return any(part.endswith((".partial", ".replaced")) for part in path.parts)


def _corrupt(path: Path, why: object) -> ValueError:
    told = str(why).removeprefix(f"report: {path}").lstrip(", ")
    why = told.removeprefix("is corrupt (").removesuffix(")") if told.startswith("is corrupt (") else told
    return ValueError(f"report: a record in {path.parent} is corrupt ({path.name}: {why}); run the training again")


def _json(path: Path) -> dict[str, Any]:
    try:
        return read_json_table(path, "report")
    except UnreadableError as error:
        raise _corrupt(path, error) from None


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        rows = read_jsonl(path) if path.exists() else []
    except UnreadableError as error:
        raise _corrupt(path, error) from None
    for row in rows:
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise _corrupt(path, "a row without a step")
    return rows


def _check_numbers(path: Path, row: dict[str, Any]) -> dict[str, Any]:
    wrong = [name for name, value in row.items() if not isinstance(value, int | float | None)]
    if wrong:
        raise _corrupt(path, f"{wrong[0]} of step {row['step']} is no number")
    return row


def _check_shape(path: Path, row: dict[str, Any]) -> dict[str, Any]:
    for name in ("units", "ranks"):
        counts = row.get(name)
        if not isinstance(counts, dict) or not all(isinstance(value, int) for value in counts.values()):
            raise _corrupt(path, f"{name} of step {row['step']} are no counts")
    return row


def _metrics(path: Path) -> dict[str, Any]:
    metrics = _json(path)
    wrong = [name for name, value in metrics.items() if not _is_right(name, value)]
    if wrong:
        raise _corrupt(path, f"{wrong[0]} is {shown(metrics[wrong[0]])}")
    return metrics


def _is_right(name: str, value: Any) -> bool:
    """Whether an entry is a text where there is to be one, a table or list where there is to be one, else a number."""
    if name in WORDS:
        return isinstance(value, str)
    if name in TABLES:
        return value is None or isinstance(value, dict)
    if name in LISTS:
        return isinstance(value, list) and len(value) == LISTS[name] and all(map(is_finite_number, value))
    # A score may be NaN; one that is not there is left out.
    return isinstance(value, int | float) or (value is None and name not in known_scores())


def _events(path: Path) -> list[Event]:
    try:
        return [Event.from_json(row) for row in _rows(path)]
    except (KeyError, TypeError, ValueError) as error:
        raise _corrupt(path, error) from None


def _timings(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    timings = _json(path)
    missing = {"sentences", "tokens", "steps", "events"} - set(timings)
    if missing:
        raise _corrupt(path, f"{min(missing)} is missing")
    return timings


def _config(path: Path) -> str:
    if not path.exists():
        return ""
    try:
        text = read_text(path, "report")
        parse_yaml(text)
    except (yaml.YAMLError, UnreadableError) as error:
        raise _corrupt(path, " ".join(str(error).split())) from None
    return text
