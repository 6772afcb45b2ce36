"""The files of an export: which they are, and how they are read and checked."""

import itertools
from pathlib import Path
from typing import Any

from torch import Tensor

from apt.files.manifest import check_manifest, sha256_of
from apt.files.reading import UnreadableError, is_finite_number, read_json_table, read_tensors, shown

CARD = "apt_export.json"
WEIGHTS = "model.safetensors"
ENTRIES = ("apt", "auto_map")  # of a config.json, by which `AutoModel` makes a free export; they are of no model
# Formats of the card, by what it says beyond the one before; a reader refuses what is newer than itself.
PLAIN = 1
WITH_HIDDEN = 2
WITH_ROW_GATES = 3
WITH_PROMPT = 4
FORMAT = WITH_PROMPT
AGAIN = "export the model again"


def read_card(folder: Path) -> dict[str, Any]:
    """What an export tells of itself; ValueError where it is none, is corrupt or newer than this version."""
    path = folder / CARD
    if not path.exists():
        raise ValueError(f"load_model: {folder} is not an export of apt; it has no {CARD}")
    try:
        card = read_json_table(path, "load_model")
    except UnreadableError as error:
        raise ValueError(f"{error}; {AGAIN}") from None
    number = card.get("format")
    if not isinstance(number, int):
        raise ValueError(f"load_model: {path} is corrupt (no format number); {AGAIN}")
    if number > FORMAT:
        raise ValueError(
            f"load_model: {folder} has format {number}, written by apt-lm {card.get('apt_version')!s:.20}; this "
            f"version reads up to {FORMAT}; upgrade apt-lm"
        )
    if any(card.get(key) is None for key in ("class", "units", "bytes", "sha256")):
        raise ValueError(f"load_model: {path} is corrupt (an entry is missing); {AGAIN}")
    reason = _first_wrong(card)
    if reason is not None:
        raise ValueError(f"load_model: {path} is corrupt ({reason}); {AGAIN}")
    check_manifest(folder, "load_model", checked=(WEIGHTS,))
    return card


def _first_wrong(card: dict[str, Any]) -> str | None:
    """The first entry of a card that says nothing a model could have, in words."""
    units, hidden = card["units"], card.get("hidden")
    if not isinstance(card["class"], str) or not card["class"].isidentifier():
        return f"class is {shown(card['class'])}"
    if not isinstance(units, dict) or not all(_is_count(count) for count in units.values()):
        return f"units are {shown(units)}"
    if hidden is not None and not (_is_count(hidden) and hidden >= 1):
        return f"hidden is {shown(hidden)}"
    orders = card.get("head_order", {})
    if not isinstance(orders, dict):
        return f"head_order is {shown(orders)}"
    for name, order in orders.items():
        right = isinstance(order, list) and all(_is_count(place) for place in order)
        # Heads stay in their order, each once.
        if not right or any(later <= earlier for earlier, later in itertools.pairwise(order)):
            return f"head_order of {shown(name)} is {shown(order)}"
    return None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and is_finite_number(value) and value >= 0


def read_weights(folder: Path, card: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of an export by name; ValueError where the file is not the one that its card describes.

    Where somebody has cut the file into shards, they are read by their index.
    """
    path = folder / WEIGHTS
    index = folder / f"{WEIGHTS}.index.json"
    if not path.exists() and index.exists():
        return _read_shards(index)
    if not path.is_file():
        raise ValueError(f"load_model: {path} is missing; {AGAIN}")
    size = path.stat().st_size
    if size != card["bytes"]:
        raise ValueError(
            f"load_model: {path} has {size} of {card['bytes']} bytes; it is truncated, copy or export it again"
        )
    if sha256_of(path) != card["sha256"]:
        raise ValueError(f"load_model: {path} is corrupt (its checksum differs); copy or export it again")
    return read_tensors(path, "load_model")[0]


def _read_shards(index: Path) -> dict[str, Tensor]:
    """The tensors that an index lists, each from its file."""
    places = read_json_table(index, "load_model").get("weight_map")
    if not isinstance(places, dict):
        places = {}
    names = set(places.values())
    if not names or not all(isinstance(name, str) and name == Path(name).name for name in names):
        raise ValueError(f"load_model: {index} is corrupt (no list of shards); {AGAIN}")
    found: dict[str, Tensor] = {}
    for shard in sorted(names):
        found |= read_tensors(index.parent / shard, "load_model")[0]
    lost = next((name for name in places if name not in found), None)
    if lost is not None:
        raise ValueError(f"load_model: {index.parent / places[lost]} lacks {lost}; copy or export it again")
    return found
