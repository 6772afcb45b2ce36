"""Progress of what takes long: one line with the time that is left, which goes away; none where it is soon over."""

from collections.abc import Iterable
from typing import TypeVar

from tqdm.auto import tqdm

Item = TypeVar("Item")
PATIENCE = 2.0  # seconds of silence before the line comes


def progress(items: Iterable[Item], what: str, unit: str = "batch", total: int | None = None) -> "tqdm[Item]":
    """Hand the items on, and tell on stderr how many are done. `total` of them, where their number is not known."""
    return tqdm(items, desc=what, unit=unit, total=total, delay=PATIENCE, leave=False)
