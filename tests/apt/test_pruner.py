"""The search: the budget is met and hardly more, whatever the scores, sizes and floors."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from unit_groups import ADVERSARIAL, FIXED, Group, groups_of, total_of

from apt.pruning import PruningConfig, UnitSearch


def kept_of(
    groups: list[Group], scores: dict[str, Tensor], sparsity: float, **settings: object
) -> dict[str, list[int]]:
    total = total_of(groups)
    pruner = UnitSearch(total, PruningConfig(**{"round_to": 8, **settings}))
    return pruner.plan(groups, scores, total, step=1, sparsity=sparsity).kept


def reached(groups: list[Group], kept: dict[str, list[int]]) -> float:
    left = FIXED + sum(len(kept[group.name]) * group.cost() for group in groups)
    return 1.0 - left / total_of(groups)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("balance", ["type", "none"])
@pytest.mark.parametrize("round_to", [1, 5, 8, 200])
@pytest.mark.parametrize("scores", ADVERSARIAL)
def test_budget_is_met_within_one_unit(scores: str, round_to: int, balance: str) -> None:
    groups = groups_of(neurons=93)  # divisible by none of them
    given = {group.name: ADVERSARIAL[scores](group.num_units) for group in groups}
    largest = max(196, min(93, round_to) * 15)
    for sparsity in (0.0, 0.1, 0.5, 0.6, 0.9, 0.97):
        kept = kept_of(groups, given, sparsity, round_to=round_to, balance=balance)
        assert kept.keys() == given.keys()
        assert sparsity <= reached(groups, kept) <= sparsity + largest / total_of(groups)
        for group in groups:
            positions = kept[group.name]
            assert positions == sorted(set(positions))
            assert all(0 <= position < group.num_units for position in positions)
            if group.kind == "neuron":
                assert len(positions) % round_to == 0 or len(positions) == group.num_units, group.name


@pytest.mark.parametrize("name", ["layers.3.heads", "layers.3.neurons"])
def test_a_score_that_is_nan_is_refused_with_its_group(name: str) -> None:
    groups = groups_of()
    scores = {group.name: torch.rand(group.num_units) for group in groups}
    scores[name][3:5] = float("nan")
    with pytest.raises(ValueError, match=rf"pruner: 2 of the \d+ scores of {name} are NaN"):
        kept_of(groups, scores, 0.8)


@pytest.mark.parametrize("balance", ["type", "none"])
@pytest.mark.parametrize("name", ["layers.3.heads", "layers.3.neurons"])
def test_a_score_that_is_inf_is_worth_most(name: str, balance: str) -> None:
    groups = groups_of()
    scores = {group.name: torch.rand(group.num_units) + 0.5 for group in groups}
    scores[name][3:6] = float("inf")
    assert {3, 4, 5} <= set(kept_of(groups, scores, 0.9, balance=balance)[name])


def test_the_best_units_stay() -> None:
    groups = groups_of()
    scores = {group.name: torch.rand(group.num_units) for group in groups}
    kept = kept_of(groups, scores, 0.5, round_to=1)
    for group in groups:
        chosen = kept[group.name]
        best = scores[group.name].argsort(descending=True)[: len(chosen)]
        assert chosen == sorted(best.tolist())


@pytest.mark.parametrize("balance", ["type", "none"])
def test_a_rising_score_loses_nothing(balance: str) -> None:
    groups = groups_of()
    scores = {group.name: torch.rand(group.num_units) for group in groups}
    for name, unit in (("layers.1.heads", 5), ("layers.2.neurons", 40)):
        was_in = False
        for value in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 5.0):
            scores[name][unit] = value
            is_in = unit in kept_of(groups, scores, 0.5, balance=balance)[name]
            assert is_in or not was_in, f"{name} lost unit {unit} at {value}"
            was_in = is_in
        assert was_in


def test_less_sparsity_keeps_more() -> None:
    groups = groups_of()
    scores = {group.name: torch.rand(group.num_units) for group in groups}
    plans = [kept_of(groups, scores, sparsity) for sparsity in (0.9, 0.6, 0.3, 0.0)]
    for fewer, more in pairwise(plans):
        assert all(set(fewer[name]) <= set(more[name]) for name in fewer)


def test_balance_lets_types_compete_on_equal_terms() -> None:
    """Scores of heads a thousand times those of neurons: by density heads win everything, balanced both lose alike."""
    groups = groups_of()
    scores = {g.name: torch.rand(g.num_units) * g.cost() * (1000 if g.kind == "head" else 1) for g in groups}
    counts = {}
    for balance in ("none", "type"):
        kept = kept_of(groups, scores, 0.5, balance=balance)
        counts[balance] = [sum(len(kept[g.name]) for g in groups if g.kind == kind) for kind in ("head", "neuron")]
    assert counts["none"][1] == 0
    assert all(0.3 < share < 0.7 for share in (counts["type"][0] / 48, counts["type"][1] / 384))
    scaled = {name: values * (7.0 if "heads" in name else 1.0) for name, values in scores.items()}
    assert kept_of(groups, scaled, 0.5, balance="type") == kept_of(groups, scores, 0.5, balance="type")


def test_density_counts_parameters() -> None:
    groups = [Group("layers.0.heads", "head", 2, 100), Group("layers.0.neurons", "neuron", 2, 10)]
    scores = {"layers.0.heads": torch.tensor([5.0, 4.0]), "layers.0.neurons": torch.tensor([0.45, 0.55])}
    pruner = UnitSearch(220, PruningConfig(balance="none", round_to=1))
    kept = pruner.plan(groups, scores, 220, step=1, sparsity=0.5).kept
    assert kept == {"layers.0.heads": [0], "layers.0.neurons": [1]}  # 0.055, 0.05 | 0.045, 0.04


@pytest.mark.parametrize("round_to", [1, 8])
@pytest.mark.parametrize("sparsity", [0.3, 0.8])
def test_floors_hold_where_scores_say_nothing(round_to: int, sparsity: float) -> None:
    groups = groups_of(floor_heads=2, floor_neurons=5)
    scores = {group.name: torch.rand(group.num_units) * (group.name > "layers.2") for group in groups}
    kept = kept_of(groups, scores, sparsity, round_to=round_to)
    assert all(len(kept[group.name]) >= group.floor for group in groups)
    assert sparsity <= reached(groups, kept) <= sparsity + 196 / total_of(groups)


def check(groups: list[Group], sparsity: float, **settings: object) -> None:
    total = total_of(groups)
    UnitSearch(total, PruningConfig(target_sparsity=sparsity, **settings)).check(groups, total)


@pytest.mark.parametrize("round_to", [1, 8])
def test_whatever_the_check_lets_through_is_met_with_every_floor(round_to: int) -> None:
    groups = groups_of(floor_heads=3, floor_neurons=9)
    scores = {group.name: torch.rand(group.num_units) for group in groups}
    passed = []
    for thousandth in range(600, 1000, 5):
        try:
            check(groups, thousandth / 1000, round_to=round_to)
        except ValueError:
            continue
        kept = kept_of(groups, scores, thousandth / 1000, round_to=round_to)
        assert all(len(kept[group.name]) >= group.floor for group in groups), thousandth
        assert reached(groups, kept) >= thousandth / 1000
        passed.append(thousandth)
    assert max(passed) > 650


def test_a_target_out_of_reach_says_how_far_one_can_go() -> None:
    groups = groups_of(floor_heads=6)
    words = r"target_sparsity 0.9 is not reachable; with min_heads=6 and min_neurons=0 at most (0\.\d+) can go; lower"
    with pytest.raises(ValueError, match="pruner: " + words) as caught:
        check(groups, 0.9, min_heads=6)
    said = float(str(caught.value).split("at most ")[1].split()[0])
    check(groups, said, min_heads=6)
    with pytest.raises(ValueError, match="not reachable"):
        check(groups, said + 0.001, min_heads=6)


def test_nothing_to_prune() -> None:
    with pytest.raises(ValueError, match="pruner: the model has no prunable units"):
        UnitSearch(100, PruningConfig()).check([], 100)


def test_plan_says_what_it_was_asked() -> None:
    groups = groups_of(layers=1)
    pruner = UnitSearch(total_of(groups), PruningConfig(round_to=4))
    scores = {group.name: torch.rand(group.num_units) for group in groups}
    plan = pruner.plan(groups, scores, total_of(groups), step=17, sparsity=0.25)
    assert (plan.step, plan.target_sparsity, plan.round_to) == (17, 0.25, 4)
