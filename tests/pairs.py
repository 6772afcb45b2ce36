"""Fewer cases of a test where each costs a compilation: each two values of its parameters that meet still meet once."""

from collections import defaultdict
from collections.abc import Iterable
from itertools import combinations
from typing import Any

import pytest
import torch

Value = tuple[str, str]  # of a parameter: its name, and what it is


def with_few(items: Iterable[pytest.Item]) -> list[pytest.Item]:
    """The items in their order, without those that are marked `interpreted`.

    Of a test that is marked `pairs` only enough cases to cover all pairs of values, and none in float16: in machine
    code it is bfloat16 over again, and `test_on_gpu.py` has every op in it.
    """
    kept: list[pytest.Item] = []
    cases: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("interpreted"):
            continue
        if not item.get_closest_marker("pairs"):
            kept.append(item)
        elif torch.float16 not in params(item).values():
            cases[item.nodeid.partition("[")[0]].append(item)
    for own in cases.values():
        kept += [own[place] for place in covering([params(item) for item in own])]
    few = {item.nodeid for item in kept}
    return [item for item in items if item.nodeid in few]


def params(item: pytest.Item) -> dict[str, Any]:
    """The values of a case by the names of its parameters."""
    return item.callspec.params  # type: ignore[attr-defined, no-any-return]


def covering(cases: list[dict[str, Any]]) -> set[int]:
    """Places of cases that hold every pair of values which any case holds, each time the case with most new ones."""
    pairs = [pairs_of(case) for case in cases]
    left = set().union(*pairs)
    kept: set[int] = set()
    while left:
        best = max(range(len(cases)), key=lambda place: len(pairs[place] & left))
        kept.add(best)
        left -= pairs[best]
    return kept


def pairs_of(case: dict[str, Any]) -> set[tuple[Value, ...]]:
    """Each two of the values of a case; where it has but one, that one. A dict of options has several."""
    values: list[Value] = []
    for name, value in sorted(case.items()):
        own = value if isinstance(value, dict) else {name: value}
        values += [(key, repr(of_key)) for key, of_key in own.items()]
    return set(combinations(values, min(2, len(values))))
