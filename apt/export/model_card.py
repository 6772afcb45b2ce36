"""The model card of an export: what it is made of, what was removed, how good and how fast it is, how to load it."""

import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData, try_to_load_from_cache

from apt.families.locate import resolve_model
from apt.files.reading import UnreadableError, parse_yaml, read_text
from apt.files.telling import markdown, printable
from apt.records import UnitName
from apt.surgery import Summary
from apt.version import versions_used

README = "README.md"
FRONT_MATTER = re.compile(r"\ufeff?\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", re.DOTALL)
MOST_CARD = 4 << 20  # bytes
NOT_FIGURES = ("method", "ablation", "model", "data", "metric", "unit", "device", "versions", "self_distillation")


@dataclass(frozen=True)
class CardFacts:
    """What a card tells of an export, beside the metrics of a run."""

    base: str  # model as it was named: on the hub, a package's, or a local folder, of which the last part is told
    kind: str  # class of transformers
    method: str | None  # None: nothing was trained
    stock: bool  # whether AutoModel loads it
    counts: Summary
    remote: str | None = None  # class of transformers that loads it by the code in its folder
    repaired: int = 0  # projections whose columns that stayed took over what went


def public_name(name: str) -> str:
    """A model's or data set's name without the place where it lies on this machine."""
    if not name:
        return "unknown"
    local = os.path.isabs(os.path.expanduser(name)) or name.startswith(".") or Path(name).exists()
    return Path(name).resolve().name if local else name


def licence_of(base: str) -> str:
    """The licence that the card of a base model names, where that card lies on this machine; else "unknown".

    Whatever else is wrong with that card is nothing to us: it was written by somebody, by hand.
    """
    try:
        folder = Path(resolve_model(base)).expanduser()
    except (ValueError, ImportError, OSError):
        return "unknown"
    card: Any = folder / README
    if not card.is_file() and not folder.exists() and base.count("/") <= 1:
        card = try_to_load_from_cache(base, README)
    if not isinstance(card, str | Path) or not Path(card).is_file():
        return "unknown"
    try:
        head = FRONT_MATTER.match(read_text(Path(card), "export", MOST_CARD))
        entries = parse_yaml(head[1]) if head is not None else None
    except (OSError, UnreadableError, yaml.YAMLError):
        return "unknown"
    found = entries.get("license") if isinstance(entries, dict) else None
    return found if isinstance(found, str) and found else "unknown"


def model_card(
    facts: CardFacts, metrics: Mapping[str, Any] | None = None, hub_tag: str | None = None, command: str | None = None
) -> str:
    """The card's text, YAML first.

    Args:
        facts: of the export.
        metrics: of the run that made it; None where a loop of the user's own did.
        hub_tag: what the hub calls the task of that run.
        command: that began it.
    """
    metrics = metrics or {}
    base = printable(public_name(facts.base))
    data = ModelCardData(
        license=licence_of(facts.base),
        base_model=None if base == "unknown" else base,
        library_name="transformers",
        pipeline_tag=hub_tag,
        datasets=[printable(public_name(str(metrics["data"])))] if "data" in metrics else None,
        metrics=[metrics["metric"]] if "metric" in metrics else None,
        tags=["apt-lm", facts.method or "compress", *(["pruned"] if facts.counts.sparsity > 0.0 else [])],
    )
    parts = [f"# {markdown(base)}, by apt-lm ({facts.method or 'compress'})", _text(facts, base, metrics)]
    parts += ["## How to load it", _loading(facts), "## What was removed, and what is left", _structure(facts)]
    if metrics:
        parts += ["## Scores and efficiency", _figures(metrics)]
    if command is not None:
        longest = max(map(len, re.findall("`+", command)), default=0)
        fence = "`" * max(3, longest + 1)
        parts += ["## How it was made", f"{fence}\n{printable(command)}\n{fence}"]
    versions = metrics.get("versions") or versions_used()
    parts += ["## Versions", _table(versions, ("package", "version"))]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"


def command_of(arguments: list[str]) -> str:
    """A command line whose paths are told by their last part alone."""

    def short(argument: str) -> str:
        key, equals, value = argument.rpartition("=")
        local = os.path.isabs(os.path.expanduser(value))
        return f"{key}{equals}{Path(value).name}" if local else argument

    return shlex.join(["python", "-m", "apt", *map(short, arguments)])


def _text(facts: CardFacts, base: str, metrics: Mapping[str, Any]) -> str:
    counts = facts.counts
    share = 1.0 - counts.params_after / counts.params_before
    lines = f"{facts.kind}, made from {markdown(base)} by apt-lm without training"
    if facts.method is not None:
        lines = f"{facts.kind}, fine-tuned from {markdown(base)} by the method {facts.method} of apt-lm"
    lines += f" on {markdown(public_name(str(metrics['data'])))}" if "data" in metrics else ""
    return (
        f"{lines}. {counts.sparsity:.1%} of its block parameters (attention, FFN, norms) and {share:.1%} of all are "
        f"gone; the adapters are merged. The licence is that of the base model."
    )


def _loading(facts: CardFacts) -> str:
    if facts.stock:
        return f"```python\nfrom transformers import {facts.kind}\n\nmodel = {facts.kind}.from_pretrained(folder)\n```"
    ours = "```python\nimport apt\n\nmodel = apt.load_model(folder)\n```"
    if facts.remote is None:
        return f"No stock configuration describes it:\n\n{ours}"
    return (
        f"Its layers differ in size, which no stock configuration can say. Transformers alone loads it by "
        f"`modeling_apt.py`, which lies here and which you have to allow:\n\n```python\nfrom transformers import "
        f"{facts.remote}\n\nmodel = {facts.remote}.from_pretrained(folder, trust_remote_code=True)\n```\n\nWithout "
        f"`trust_remote_code=True` that ends in an error of shapes. With apt-lm, and no code but its own:\n\n{ours}"
    )


def _structure(facts: CardFacts) -> str:
    counts = facts.counts
    rows: dict[str, Any] = {
        "parameters before": f"{counts.params_before:,}",
        "parameters after": f"{counts.params_after:,}",
        "sparsity of the blocks": f"{counts.sparsity:.1%}",
    }
    if not all(counts.layers.values()):
        rows["layers left"] = f"{sum(counts.layers.values())} of {len(counts.layers)}"
    found: dict[str, list[int]] = {}
    for name, count in counts.units.items():
        found.setdefault(UnitName.parse(name).title, []).append(count)
    rows |= {f"{kind} left, layer by layer": " ".join(map(str, left)) for kind, left in found.items()}
    if counts.hidden:
        rows["hidden dimensions"] = counts.hidden
    if facts.repaired:
        rows["projections repaired for what they lost"] = facts.repaired
    if counts.ranks and facts.method is not None:
        rows["ranks of the adapters, now merged"] = " ".join(map(str, counts.ranks.values()))
    if counts.virtual_tokens:
        rows["virtual tokens"] = counts.virtual_tokens
    return _table(rows, ("what", "how much"))


def _figures(metrics: Mapping[str, Any]) -> str:
    rows = {name: value for name, value in metrics.items() if name not in NOT_FIGURES and value is not None}
    return _table(rows, ("figure", "value"))


def _table(rows: Mapping[str, Any], head: tuple[str, str]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|"]
    return "\n".join([*lines, *(f"| {markdown(name)} | {_cell(value)} |" for name, value in rows.items())])


def _cell(value: Any) -> str:
    """A value in a table; numbers, and lists of them, hold nothing that Markdown reads."""
    is_shape = isinstance(value, list) and all(isinstance(number, int | float) for number in value)
    return str(value) if is_shape else markdown(value)
