"""Transformers' own files, with code that makes layers of their own sizes where no stock configuration can say them."""

from pathlib import Path

import transformers

from apt.deploy import hf
from apt.deploy.formats import Comparison
from apt.deploy.source import Source
from apt.export.files import CARD
from apt.export.remote import remote_class

QUANTISED: tuple[str, ...] = ()


def refuse(source: Source) -> str | None:
    """What is more than a model of transformers with smaller layers: a prompt, gates that depend on the example."""
    if source.is_stock or remote_class(source.folder):
        return None
    return f"{source.card.get('why_not_stock')}, so it is more than smaller layers; apt.load_model loads it"


def write(source: Source, folder: Path, quantise: str | None) -> list[str]:
    """Copy the folder; what `apt.load_model` alone reads is left out."""
    hf.write(source, folder, quantise)
    (folder / CARD).unlink(missing_ok=True)
    return [] if source.is_stock else ["transformers loads it with trust_remote_code=True: modeling_apt.py is run"]


def compare(source: Source, folder: Path, quantise: str | None) -> Comparison:
    """Load it as a user without this package does."""
    program = f"transformers {transformers.__version__}"
    if source.is_stock:
        return hf.compare_with(hf.stock_model(folder), program, source)
    auto = getattr(transformers, str(remote_class(folder)))
    loaded = auto.from_pretrained(folder, trust_remote_code=True, dtype="auto").eval()
    return hf.compare_with(loaded, f"{program}, trust_remote_code", source)
