"""The few cases that a GPU gets still hold every two values that meet."""

from itertools import product
from types import SimpleNamespace
from typing import Any

import torch
from pairs import covering, pairs_of, with_few

CASES: list[dict[str, Any]] = [
    {"kind": kind, "dtype": dtype, "options": {"masked": masked, "biased": biased}}
    for kind, dtype, masked, biased in product("abc", (16, 32, 64), (0, 1), (0, 1))
]


def item(name: str, marker: str, params: dict[str, Any], place: int) -> Any:
    has = {marker: True}.get
    return SimpleNamespace(nodeid=f"{name}[{place}]", callspec=SimpleNamespace(params=params), get_closest_marker=has)


def test_every_pair_of_values_is_kept() -> None:
    kept = covering(CASES)
    assert set().union(*(pairs_of(CASES[place]) for place in kept)) == set().union(*map(pairs_of, CASES))
    assert 9 <= len(kept) <= 12  # of 36


def test_a_pair_that_never_met_is_not_asked_for() -> None:
    cases = [case for case in CASES if (case["kind"], case["dtype"]) != ("a", 64)]
    assert set().union(*(pairs_of(cases[place]) for place in covering(cases))) == set().union(*map(pairs_of, cases))


def test_only_marked_tests_have_fewer_cases() -> None:
    marked, whole, left_out = (
        [item(marker, marker, case, place) for place, case in enumerate(CASES)]
        for marker in ("pairs", "slow", "interpreted")
    )
    few = with_few([*marked, *whole, *left_out])
    assert [case.nodeid for case in few if case in whole] == [case.nodeid for case in whole]
    assert not [case for case in few if case in left_out]
    assert not with_few([item("half", "pairs", {"dtype": torch.float16}, 0)])
    assert [case.nodeid for case in few if case in marked] == [
        marked[place].nodeid for place in sorted(covering(CASES))
    ]
