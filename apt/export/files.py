"""The files of an export: which they are, and how they are read and checked."""

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

CARD = "apt_export.json"
WEIGHTS = "model.safetensors"
# Formats of the card, by what it says beyond the one before; a reader refuses what is newer than itself.
PLAIN = 1
WITH_HIDDEN = 2
WITH_ROW_GATES = 3
WITH_PROMPT = 4
FORMAT = WITH_PROMPT


def read_card(folder: Path) -> dict[str, Any]:
    """What an export tells of itself; ValueError where it is none, is corrupt or newer than this version."""
    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"load_model: {folder} is not an export of apt; it has no {CARD}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"load_model: {folder / CARD} is corrupt ({error}); export the model again") from None
    if not isinstance(card, dict) or not isinstance(card.get("format"), int):
        raise ValueError(f"load_model: {folder / CARD} is corrupt (no format number); export the model again")
    if card["format"] <= FORMAT and any(card.get(key) is None for key in ("class", "units", "bytes", "sha256")):
        raise ValueError(f"load_model: {folder / CARD} is corrupt (an entry is missing); export the model again")
    if card["format"] > FORMAT:
        raise ValueError(
            f"load_model: {folder} has format {card['format']}, written by apt-lm {card.get('apt_version')}; this "
            f"version reads up to {FORMAT}; upgrade apt-lm"
        )
    return card


def read_weights(folder: Path, card: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of an export by name; ValueError where the file is not the one that its card describes."""
    path = folder / WEIGHTS
    if not path.exists():
        raise ValueError(f"load_model: {path} is missing; export the model again")
    size = path.stat().st_size
    if size != card["bytes"]:
        raise ValueError(
            f"load_model: {path} has {size} of {card['bytes']} bytes; it is truncated, copy or export it again"
        )
    if sha256_of(path) != card["sha256"]:
        raise ValueError(f"load_model: {path} is corrupt (its checksum differs); copy or export it again")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"load_model: {path} is corrupt ({error}); export the model again") from None


def sha256_of(path: Path) -> str:
    """The checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:
    """`hashlib.file_digest` of Python 3.11, for 3.10."""
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()
