"""Checks that the sections of a config share."""

from collections.abc import Iterable, Mapping
from typing import Any


def check_at_least(section: str, settings: Any, bounds: Mapping[str, float]) -> None:
    """Raise ValueError for the first field that is below its bound; None passes."""
    for name, low in bounds.items():
        value = getattr(settings, name)
        if value is not None and value < low:
            raise ValueError(f"config: {section}.{name} must be at least {low}, got {value}")


def check_one_of(key: str, value: str, known: Iterable[str]) -> None:
    """Raise ValueError for a value that is not known."""
    if value not in known:
        raise ValueError(f"config: {key} must be one of {list(known)}, got {value!r}")
