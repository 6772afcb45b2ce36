"""Transformers' own files: our export as it is, or a PEFT folder merged into its base."""

import json
import shutil
from pathlib import Path
from typing import Any

import transformers

from apt.deploy.formats import Comparison
from apt.deploy.probe import difference, greedy, inputs_of, logits_of
from apt.deploy.source import Source
from apt.export.read import load_model
from apt.export.remote import remote_class
from apt.files.manifest import FREE, MANIFEST

QUANTISED: tuple[str, ...] = ()


def refuse(source: Source) -> str | None:
    """Nothing: what has no stock configuration is read by `apt.load_model`."""
    return None


def write(source: Source, folder: Path, quantise: str | None) -> list[str]:
    """Copy an export or a model folder."""
    if not source.is_ours:
        source.model.save_pretrained(folder)
        return []
    for path in sorted(source.folder.iterdir()):
        if path.is_file() and path.name not in (MANIFEST, *FREE):
            shutil.copyfile(path, folder / path.name)
    if source.is_stock:
        return []
    remote = remote_class(source.folder)
    by = f"{remote} with trust_remote_code=True, and apt.load_model" if remote else "apt.load_model alone"
    return [f"no stock configuration describes it ({source.card.get('why_not_stock')}); it is loaded by {by}"]


def compare(source: Source, folder: Path, quantise: str | None) -> Comparison:
    """Load it by the class that its config names, or else by ours."""
    if source.is_stock:
        return compare_with(stock_model(folder), f"transformers {transformers.__version__}", source)
    return compare_with(load_model(folder), "apt.load_model", source)


def compare_with(theirs: Any, program: str, source: Source) -> Comparison:
    """A model of transformers beside the one that was written."""
    inputs = inputs_of(source.model)
    off = difference(logits_of(theirs, inputs), logits_of(source.model, inputs), inputs["attention_mask"])
    same = greedy(theirs, inputs) == greedy(source.model, inputs) if source.generates else None
    return Comparison(program, off, same)


def stock_model(folder: Path) -> Any:
    """The model of a folder by the class that its config names."""
    name = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    return getattr(transformers, name).from_pretrained(folder, dtype="auto").eval()
