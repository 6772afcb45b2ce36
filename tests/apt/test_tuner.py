"""Rank growth: the budget is spent to the last whole rank, on the more important half, and no rank falls."""

import math
import random
from typing import Any

import pytest

from apt.pruning.ranks import AdapterSize, TuningConfig, plan_ranks


def sizes_of(*, count: int = 10, seed: int = 0, ranks: tuple[int, int] = (8, 8)) -> dict[str, AdapterSize]:
    draw = random.Random(seed)
    return {
        f"a{i}": AdapterSize(rank=draw.randint(*ranks), width=draw.randint(10, 5000), importance=draw.random())
        for i in range(count)
    }


def spent(sizes: dict[str, AdapterSize], ranks: dict[str, int]) -> int:
    return sum(size.width * ranks.get(name, size.rank) for name, size in sizes.items())


def top_half(sizes: dict[str, AdapterSize], max_rank: int) -> list[str]:
    growing = [name for name in sizes if sizes[name].rank < max_rank]
    return sorted(growing, key=lambda name: -sizes[name].importance)[: len(sizes) // 2]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ranks", [(8, 8), (1, 12)], ids=["equal ranks", "mixed ranks"])
@pytest.mark.parametrize("ratio", [1.0, 1.01, 1.3, 1.75, 2.5, 4.0])
def test_budget_is_met_within_the_cheapest_rank(ratio: float, ranks: tuple[int, int], seed: int) -> None:
    sizes = sizes_of(seed=seed, ranks=ranks)
    budget = int(spent(sizes, {}) * ratio)
    plan = plan_ranks(sizes, step=3, budget=budget, max_rank=10**6)
    cheapest = min(sizes[name].width for name in top_half(sizes, 10**6))
    assert budget - cheapest < spent(sizes, plan.ranks) <= budget
    assert set(plan.ranks) <= set(top_half(sizes, 10**6))
    assert all(rank > sizes[name].rank for name, rank in plan.ranks.items())
    assert (plan.step, plan.budget) == (3, budget)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ratio", [1.0, 1.01, 1.75, 4.0])
def test_uniform_growth_spends_the_same_budget_on_all(ratio: float, seed: int) -> None:
    sizes = sizes_of(seed=seed)
    budget = int(spent(sizes, {}) * ratio)
    plan = plan_ranks(sizes, step=3, budget=budget, max_rank=10**6, strategy="uniform")
    assert budget - min(size.width for size in sizes.values()) < spent(sizes, plan.ranks) <= budget
    ranks = [plan.ranks.get(name, 8) for name in sizes]
    assert min(ranks) == int(8 * budget / spent(sizes, {}))
    without = {name: AdapterSize(rank=size.rank, width=size.width, importance=0.0) for name, size in sizes.items()}
    assert plan_ranks(without, step=3, budget=budget, max_rank=10**6, strategy="uniform") == plan


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ratio", [1.0, 1.1, 1.75, 4.0])
def test_the_rule_of_the_paper(ratio: float, seed: int) -> None:
    sizes = sizes_of(seed=seed, ranks=(1, 12))
    now = spent(sizes, {})
    plan = plan_ranks(sizes, step=3, budget=int(now * ratio), max_rank=30, rule="paper")
    for name, size in sizes.items():
        grown = min(30, math.floor(size.rank * int(now * ratio) / now))
        wanted = grown if name in top_half(sizes, 30) else size.rank
        assert plan.ranks.get(name, size.rank) == max(size.rank, wanted), name
    assert spent(sizes, plan.ranks) <= now * ratio


def test_the_rule_of_the_paper_underspends() -> None:
    """36 equal adapters at rank 8 and 1.75 times the budget: 18 of them go to 14, and (1 + 1.75) / 2 of it is spent."""
    sizes = {f"a{i:02}": AdapterSize(rank=8, width=96, importance=float(i % 18)) for i in range(36)}
    plan = plan_ranks(sizes, step=1, budget=int(1.75 * spent(sizes, {})), max_rank=64, rule="paper")
    assert set(plan.ranks.values()) == {14}
    assert spent(sizes, plan.ranks) == 1.375 * spent(sizes, {})


@pytest.mark.parametrize("seed", range(5))
def test_cap(seed: int) -> None:
    sizes = sizes_of(seed=seed, ranks=(6, 16))
    budget = 4 * spent(sizes, {})
    plan = plan_ranks(sizes, step=1, budget=budget, max_rank=16)
    top = top_half(sizes, 16)
    assert all(sizes[name].rank < 16 for name in top)
    assert plan.ranks == dict.fromkeys(top, 16)  # a budget of four times fills all that may grow
    assert spent(sizes, plan.ranks) < budget


def test_the_cap_of_some_leaves_more_to_the_others() -> None:
    sizes = {
        name: AdapterSize(rank=rank, width=10, importance=1.0)
        for name, rank in (("a", 15), ("b", 4), ("c", 1), ("d", 1))
    }
    plan = plan_ranks(sizes, step=1, budget=spent(sizes, {}) + 100, max_rank=16)
    assert plan.ranks == {"a": 16, "b": 13}


def test_the_half_is_of_all_adapters_also_of_those_at_the_cap() -> None:
    sizes = {f"a{i}": AdapterSize(rank=4 if i < 3 else 1, width=10, importance=float(i)) for i in range(6)}
    plan = plan_ranks(sizes, step=1, budget=10_000, max_rank=4)
    assert plan.ranks == {"a3": 4, "a4": 4, "a5": 4}
    assert plan_ranks(sizes, step=1, budget=spent(sizes, {}) + 10, max_rank=4).ranks == {"a5": 2}


def test_ties_and_no_importance_take_the_order_of_the_model() -> None:
    sizes = {name: AdapterSize(rank=2, width=10, importance=0.0) for name in "abcd"}
    assert plan_ranks(sizes, step=1, budget=100, max_rank=64).ranks == {"a": 3, "b": 3}


@pytest.mark.parametrize("budget", [0, 1, 79, 80, 89])
def test_without_room_for_a_rank_nothing_changes(budget: int) -> None:
    sizes = {name: AdapterSize(rank=2, width=10, importance=1.0) for name in "abcd"}
    assert plan_ranks(sizes, step=1, budget=budget, max_rank=64).ranks == {}


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_adapters_for_a_half(count: int) -> None:
    assert plan_ranks(sizes_of(count=count), step=1, budget=10_000, max_rank=64).ranks == {}


def test_two_and_a_half_times_by_hand() -> None:
    """36 equal adapters at rank 8 and 1.75 times the budget: 18 of them go to 20, as rate = 0.75 * 2 + 1 says."""
    sizes = {f"a{i:02}": AdapterSize(rank=8, width=96, importance=float(i % 18)) for i in range(36)}
    plan = plan_ranks(sizes, step=1, budget=int(1.75 * spent(sizes, {})), max_rank=64)
    assert set(plan.ranks.values()) == {20}
    assert len(plan.ranks) == 18


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"budget_ratio": 0.9}, "budget_ratio and max_rank must be at least 1, got 0.9 and 64"),
        ({"max_rank": 0}, "budget_ratio and max_rank must be at least 1, got 4.0 and 0"),
        (
            {"rank_increase_strategy": "all"},
            r"rank_increase_strategy must be one of \['top_half', 'uniform'\], got 'all'",
        ),
        ({"rule": "half"}, r"rule must be one of \['top_half', 'paper'\], got 'half'"),
        ({"importance": "abs"}, r"importance must be one of \['signed', 'elementwise'\], got 'abs'"),
        ({"max_tuning_params_ratio": 0.0}, "max_tuning_params_ratio must be above 0 and at most 1, got 0.0"),
        ({"init_std": 0.0}, "init_std must be above 0, got 0.0"),
        ({"tune_start": -1}, r"tune_start must be a fraction in \[0, 1\] or a number of steps, got -1"),
        ({"tune_end": 1.5}, "tune_end must be a fraction .* got 1.5"),
        ({"num_tuning_events": -1}, "num_tuning_events must be at least 0, got -1"),
    ],
)
def test_bad_settings(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match="tuning: .*" + words):
        TuningConfig(**settings)
