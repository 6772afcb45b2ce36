"""The page of a run and the page of a folder of runs: which sections there are, filled into `page.html`."""

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from apt.runs.report import compare, curves, heatmaps
from apt.runs.report.pictures import Picture
from apt.runs.report.records import RunRecord
from apt.runs.report.tables import (
    Rows,
    Sheet,
    efficiency_rows,
    events_sheet,
    number,
    repaired_sheet,
    score_rows,
    size_rows,
    timings_sheet,
)

PAGE = "report.html"
ABOUT = ("model", "data", "device", "seed", "steps", "train_size", "test_size")  # of metrics.json
TEMPLATE = Path(__file__).with_name("page.html")


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of a page, in this order: texts, pictures (or why there is none), tables, a listing."""

    title: str
    texts: tuple[str, ...] = ()
    pictures: tuple[Picture | str, ...] = ()
    sheets: tuple[Sheet, ...] = ()
    narrow: bool = False  # its tables stand side by side where there is room
    code: str = ""

    @property
    def key(self) -> str:
        """Its anchor."""
        return self.title.lower().replace(" ", "-")


@dataclass(frozen=True)
class Page:
    """A page as text, and the pictures on it."""

    html: str
    pictures: list[Picture]


def run_page(run: RunRecord) -> Page:
    """The page of a run; what it did not record is said in its place."""
    metrics = run.metrics
    efficiency = Sheet("Efficiency", (), efficiency_rows(run))
    results = (Sheet("Scores", (), score_rows(run)), Sheet("Size", (), size_rows(run)), efficiency)
    versions = metrics.get("versions") or {}
    about: Rows = [(name.replace("_", " "), str(metrics[name])) for name in ABOUT if name in metrics]
    about += [(f"version of {name}", str(version)) for name, version in versions.items()]
    sections = [
        Section(title="Results", sheets=tuple(sheet for sheet in results if sheet.rows), narrow=True),
        Section(title="Training", pictures=(curves.loss(run), curves.score(run))),
        Section(title="Sparsity and budget", pictures=(curves.sparsity(run), curves.budget(run))),
        Section(title="What is left", pictures=(*heatmaps.units(run), heatmaps.ranks(run), curves.hidden(run))),
        Section(title="Salience", texts=(SALIENCE,), pictures=tuple(curves.salience(run))),
        Section(title="Time and memory", pictures=(curves.step_time(run), curves.throughput(run), curves.memory(run))),
        _events(run),
        Section(title="Config", texts=() if run.config else (NO_CONFIG,), code=run.config),
        Section(title="Versions", sheets=(Sheet("What ran where", (), about),)),
    ]
    lead = f"{metrics.get('method', 'a run')} on {metrics.get('model', 'a model')}, {metrics.get('data', '')}"
    return _fill(run.label, lead.rstrip(", "), _facts(run), sections)


NO_CONFIG = "Not recorded: there is no config.yaml."
SALIENCE = (
    "Before each event: the box is the middle half, the line the median, whiskers reach from 5 to 95 %. Units differ "
    "in cost, and the search weighs salience by it, so the two may overlap."
)


def _events(run: RunRecord) -> Section:
    if not run.events:
        return Section(title="Events", texts=("No event: nothing was pruned, and no rank grew.",))
    timed = (timings_sheet(run.timings),) if run.timings.get("events") else ()
    return Section(title="Events", sheets=(events_sheet(run.events), *repaired_sheet(run.events), *timed))


def _facts(run: RunRecord) -> list[tuple[str, str]]:
    """The few numbers on top."""
    metrics, facts = run.metrics, []
    if run.metric in metrics:
        facts.append((str(run.metric), f"{metrics[run.metric]:.4f}"))
    if metrics.get("sparsity") is not None:
        facts.append(("sparsity", f"{metrics['sparsity']:.1%}"))
    if metrics.get("params_after") is not None:
        facts.append(("parameters", f"{metrics['params_after'] / 1e6:,.1f} M"))
    if metrics.get("latency_ms_dense") and metrics.get("latency_ms_small"):
        facts.append(("inference", f"{metrics['latency_ms_dense'] / metrics['latency_ms_small']:.2f} times as fast"))
    if metrics.get("train_seconds") is not None:
        facts.append(("training", f"{number(metrics['train_seconds'], ',.0f')} s"))
    return facts


def folder_page(folder: Path, runs: list[RunRecord], unread: list[str]) -> Page:
    """The page of a folder of runs, with a link to the page of each.

    Args:
        folder: that holds them.
        runs: in the order of the tables.
        unread: a sentence on each run that could not be read.
    """
    baselines = [run.label for run in runs if compare.is_baseline(run)]
    ringed = f"Ringed: {', '.join(baselines)}." if baselines else "No unpruned run of full fine-tuning or LoRA is here."
    table, *relative = compare.comparisons(runs)
    sections = [
        Section(title="Runs", texts=tuple(unread), sheets=(table,)),
        Section(
            title="Score against time",
            texts=(f"Numbers are those of the table. {ringed}",),
            pictures=tuple(compare.trade_offs(runs)),
        ),
        Section(
            title="Against the baselines",
            texts=("Below 1 is less than the baseline's; of several seeds the run's own counts, else their mean.",)
            if relative
            else ("There is no unpruned run of full fine-tuning or LoRA on the same model and data to compare with.",),
            sheets=tuple(relative),
        ),
    ]
    links = {run.label: quote(f"{run.folder.relative_to(folder).as_posix()}/{PAGE}") for run in runs}
    return _fill(folder.resolve().name, f"{len(runs)} finished runs", [], sections, links)


def _fill(
    title: str,
    lead: str,
    facts: list[tuple[str, str]],
    sections: list[Section],
    links: dict[str, str] | None = None,
) -> Page:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["data_uri"] = _data_uri
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    values: dict[str, Any] = {"title": title, "lead": lead, "facts": facts, "sections": sections, "links": links or {}}
    drawn = [item for section in sections for item in section.pictures if isinstance(item, Picture)]
    return Page(template.render(**values), drawn)


def _data_uri(picture: Picture) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(picture.svg.encode("utf-8")).decode("ascii")
