"""Transformers' own files that `AutoModel` loads: layers that differ are padded with zeros to one shape."""

from pathlib import Path

import transformers

from apt.deploy import hf
from apt.deploy.formats import Comparison
from apt.deploy.padded import padded_model, padding_notes, why_not_padded
from apt.deploy.source import Source
from apt.families import anatomy_of

QUANTISED: tuple[str, ...] = ()


def refuse(source: Source) -> str | None:
    """What no stock configuration can say even of padded layers."""
    return None if source.is_stock else why_not_padded(source)


def write(source: Source, folder: Path, quantise: str | None) -> list[str]:
    """Copy a folder that is uniform already, or write the padded model."""
    if source.is_stock:
        return hf.write(source, folder, quantise)
    assert source.anatomy is not None, "a model of no family has one shape"
    padded = padded_model(source.anatomy)
    padded.save_pretrained(folder)
    return padding_notes(source.anatomy, anatomy_of(padded))


def compare(source: Source, folder: Path, quantise: str | None) -> Comparison:
    """Load it by the class that its config names."""
    return hf.compare_with(hf.stock_model(folder), f"transformers {transformers.__version__}", source)
