"""Writes docs/settings.md from the dataclasses of the settings: python docs/make_settings.py."""

import ast
import dataclasses
import inspect
import io
import tokenize
from pathlib import Path
from typing import Any

from apt.apt_config import ABLATIONS
from apt.runs.config import SECTIONS, SHORTHANDS, RunConfig
from apt.runs.config.document_keys import DOCUMENT_KEYS, MEANING

PAGE = Path(__file__).with_name("settings.md")
COMMAND = "python docs/make_settings.py"
HEAD = f"""# Settings

Made by `{COMMAND}` from the dataclasses of the rooms; a test holds it to them.

A config is one YAML file with a section for each room. Unknown keys are errors that name the nearest one. On the
command line `section.key=value` goes on top; the name of the key alone is enough, as no two sections share one. Values
are YAML. Where a key takes a point of the run, a float is a fraction of it and a whole number an optimizer step.
"""


def comments(room: type) -> dict[str, str]:
    """What the source says of each field: the comment beside it, or the lines above it."""
    source = inspect.getsource(room)
    lines: dict[int, str] = {}
    full = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            lines[token.start[0]] = token.string.lstrip("# ")
            if token.line.lstrip().startswith("#"):
                full.add(token.start[0])
    found = {}
    body = ast.parse(source).body[0]
    assert isinstance(body, ast.ClassDef)
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            assert node.end_lineno is not None
            above = node.lineno - 1
            while above in full:
                above -= 1
            told = range(above + 1, node.end_lineno + 1)
            found[node.target.id] = " ".join(lines[line] for line in told if line in lines)
    return found


def default(entry: Any) -> str:
    """The default of a field, as YAML."""
    if entry.default is dataclasses.MISSING:
        return "required"
    value = list(entry.default) if isinstance(entry.default, tuple) else entry.default
    words = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return f"`{words[value]}`"
    text = str(round(value, 6)) if isinstance(value, float) else str(value).replace("'", "")
    return f"`{text}`"


def table(rows: list[list[str]]) -> str:
    title, *rest = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows]
    return "\n".join([f"| {title} |", "|" + "---|" * len(rows[0]), *(f"| {row} |" for row in rest)])


def section(name: str, room: type) -> str:
    told = comments(room)
    silent = [entry.name for entry in dataclasses.fields(room) if not dataclasses.is_dataclass(entry.type)]
    silent = [leaf for leaf in silent if not told[leaf]]
    if silent:
        raise ValueError(f"{room.__name__}.{silent[0]} has no comment: say what it is, its unit and its range")
    text = (room.__doc__ or "").strip().split("\n\n")[0]
    rows = [
        [f"`{entry.name}`", default(entry), told[entry.name]]
        for entry in dataclasses.fields(room)
        if not dataclasses.is_dataclass(entry.type)
    ]
    return f"## {name}\n\n{' '.join(text.split())}\n\n" + table([["key", "default", "what, unit, range"], *rows])


def mapped() -> str:
    rows = [[f"`{key}`", f"`{ours}`", MEANING[key]] for key, (ours, _) in DOCUMENT_KEYS.items()]
    rows += [[f"`{short}=` (command line)", f"`{full}`", "the same value"] for short, full in SHORTHANDS.items()]
    text = "These may stand in a config or an override in the place of ours, never beside it."
    return f"## Keys that stand for others\n\n{text}\n\n" + table([["key", "ours", "its value"], *rows])


def ablations() -> str:
    rows = []
    for name, changes in ABLATIONS.items():
        leaves = [f"`{room}.{leaf}: {value}`" for room, values in changes.items() for leaf, value in values.items()]
        rows.append([f"`{name}`", ", ".join(leaves).replace("None", "null") or "nothing"])
    return "## Ablations\n\n`ablation: NAME`, or `--ablation NAME`, overrules these settings.\n\n" + table(
        [["name", "what it sets"], *rows]
    )


def page() -> str:
    """The whole page."""
    parts = [section(name, room) for name, room in {"Top level": RunConfig, **SECTIONS}.items()]
    return "\n\n".join([HEAD.rstrip(), *parts, mapped(), ablations()]).replace("False", "false") + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
