"""The search against slower statements of it: the former implementation, every subset, and equal layers counted out."""

from itertools import combinations, product

import numpy as np
import pytest
import torch
from own_loop import BRIEF, Loop, patched
from torch import Tensor
from unit_groups import ADVERSARIAL, FIXED, Group, groups_of, total_of

import apt
from apt.pruning import LARGEST, PruningConfig, UnitSearch

Scores = dict[str, Tensor]
SPARSITIES = (0.0, 0.1, 0.5, 0.6, 0.9, 0.97)


def plan_of(groups: list[Group], scores: Scores, sparsity: float, **settings: object) -> dict[str, list[int]]:
    total = total_of(groups)
    pruner = UnitSearch(total, PruningConfig(**settings))
    return pruner.plan(groups, scores, total, step=1, sparsity=sparsity).kept


def former_plan(
    groups: list[Group], scores: Scores, sparsity: float, round_to: int, balance: str
) -> dict[str, list[int]]:
    """The search of version 0.1, group by group."""
    budget = (1.0 - sparsity) * total_of(groups) - FIXED
    orders, sizes, density = [], [], []
    for group in groups:
        bundle = round_to if group.kind == "neuron" else 1
        values = scores[group.name].double().numpy().clip(-LARGEST, LARGEST)
        order = np.argsort(-values, kind="stable")
        starts = np.arange(0, len(values), bundle)
        size = np.diff(np.append(starts, len(values)))
        mean = np.minimum.accumulate(np.add.reduceat(values[order], starts) / size) / group.cost()
        orders.append(order)
        sizes.append(size)
        density.append(mean)
    for kind in {group.kind for group in groups} if balance == "type" else ():
        mine = [index for index, group in enumerate(groups) if group.kind == kind]
        mean = np.average(np.concatenate([density[i] for i in mine]), weights=np.concatenate([sizes[i] for i in mine]))
        if mean > 0.0:
            for index in mine:
                density[index] /= mean
    for group, mean, size in zip(groups, density, sizes, strict=True):
        mean[: np.searchsorted(np.cumsum(size), group.floor) + 1 if group.floor else 0] = np.inf
    owners = np.concatenate([np.full(len(size), index) for index, size in enumerate(sizes)])
    counts = np.concatenate(sizes)
    ranked = np.argsort(-np.concatenate(density), kind="stable")
    spent, kept = 0, [0] * len(groups)
    for bundle in ranked:
        spent += counts[bundle] * groups[owners[bundle]].cost()
        if spent > budget:
            break
        kept[owners[bundle]] += counts[bundle]
    return {g.name: sorted(order[:n].tolist()) for g, order, n in zip(groups, orders, kept, strict=True)}


@pytest.mark.parametrize("balance", ["type", "none"])
@pytest.mark.parametrize("round_to", [1, 5, 8, 200])
@pytest.mark.parametrize("scores", ADVERSARIAL)
def test_plans_are_those_of_the_former_search(scores: str, round_to: int, balance: str) -> None:
    for floors in ({}, {"floor_heads": 2, "floor_neurons": 9}):
        groups = groups_of(neurons=93, **floors)
        given = {group.name: ADVERSARIAL[scores](group.num_units) for group in groups}
        for sparsity in SPARSITIES:
            wanted = former_plan(groups, given, sparsity, round_to, balance)
            assert plan_of(groups, given, sparsity, round_to=round_to, balance=balance) == wanted


@pytest.mark.parametrize("seed", range(8))
def test_no_subset_within_the_budget_is_worth_more_than_one_unit_more(seed: int) -> None:
    """All 4096 subsets of a tiny problem: what stays falls short of the best by less than the first unit left out."""
    torch.manual_seed(seed)
    groups = [Group("layers.0.heads", "head", 4, 31), Group("layers.0.neurons", "neuron", 8, 7)]
    scores = {group.name: torch.rand(group.num_units) for group in groups}
    units = [(g.name, i, float(scores[g.name][i]), g.cost()) for g in groups for i in range(g.num_units)]
    subsets = [chosen for size in range(13) for chosen in combinations(units, size)]
    for sparsity in (0.2, 0.5, 0.8):
        budget = (1.0 - sparsity) * total_of(groups) - FIXED
        best = max(sum(u[2] for u in chosen) for chosen in subsets if sum(u[3] for u in chosen) <= max(budget, 0))
        kept = plan_of(groups, scores, sparsity, round_to=1, balance="none")
        worth = sum(float(scores[name][positions].sum()) for name, positions in kept.items())
        out = [u for u in units if u[1] not in kept[u[0]]]
        first_out = max(out, key=lambda u: u[2] / u[3])
        assert best - first_out[2] - 1e-6 < worth <= best + 1e-6


def test_of_equal_scores_the_earlier_stay() -> None:
    groups = groups_of(layers=3)
    given = {group.name: torch.full((group.num_units,), 0.5) for group in groups}
    kept = plan_of(groups, given, 0.5)
    for kind in ("heads", "neurons"):
        counts = [len(kept[f"layers.{i}.{kind}"]) for i in range(3)]
        assert counts == sorted(counts, reverse=True)
    assert all(positions == list(range(len(positions))) for positions in kept.values())
    assert kept == plan_of(groups, given, 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_plan_needs_only_the_values(dtype: torch.dtype, device: str) -> None:
    """Whatever holds the scores: device, strides and dtype alike, equal values give equal plans."""
    groups = groups_of()
    given = {group.name: torch.rand(group.num_units).to(dtype) for group in groups}
    other = {
        name: torch.stack([values.double(), -values.double()], 1)[:, 0].to(device) for name, values in given.items()
    }
    assert not other["layers.0.neurons"].is_contiguous()
    assert plan_of(groups, given, 0.6) == plan_of(groups, other, 0.6)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("round_to", [1, 8, 40])
@pytest.mark.parametrize("scores", ADVERSARIAL)
def test_uniform_layers_are_equal_and_meet_the_budget(scores: str, round_to: int) -> None:
    groups = groups_of(neurons=93)
    given = {group.name: ADVERSARIAL[scores](group.num_units) for group in groups}
    total = total_of(groups)
    for sparsity in (0.0, 0.1, 0.5, 0.6, 0.8 if round_to < 40 else 0.75):  # what one bundle in every layer allows
        kept = plan_of(groups, given, sparsity, layout="uniform", round_to=round_to)
        heads, neurons = ({len(kept[f"layers.{i}.{kind}"]) for i in range(4)} for kind in ("heads", "neurons"))
        assert (len(heads), len(neurons)) == (1, 1)
        assert min(heads) >= 1
        assert min(neurons) in (93, *range(round_to, 93, round_to))
        left = (1.0 - sparsity) * total - FIXED - sum(len(kept[g.name]) * g.cost() for g in groups)
        more_neurons = min(round_to, 93 - min(neurons))
        further = [4 * 196] * (min(heads) < 12) + [4 * 15 * more_neurons] * (more_neurons > 0)
        assert 0 <= left < min(further, default=1)  # no head and no bundle more in every layer


def test_uniform_keeps_the_best_of_each_layer() -> None:
    groups = groups_of()
    given = {group.name: torch.rand(group.num_units) for group in groups}
    for name, positions in plan_of(groups, given, 0.5, layout="uniform", round_to=1).items():
        assert positions == sorted(given[name].argsort(descending=True)[: len(positions)].tolist())


@pytest.mark.parametrize("seed", range(5))
def test_no_pair_of_counts_is_worth_more_than_one_row_more(seed: int) -> None:
    """Uniform, every pair of counts tried: short of the best by less than the first row of units left out."""
    torch.manual_seed(seed)
    groups = groups_of(neurons=20, layers=3)
    given = {group.name: torch.rand(group.num_units) for group in groups}
    rows = {
        kind: torch.stack([given[g.name].sort(descending=True).values for g in groups if g.kind == kind]).sum(0)
        for kind in ("head", "neuron")
    }
    costs = {"head": 3 * 196, "neuron": 3 * 15}
    budget = 0.5 * total_of(groups) - FIXED
    best = max(
        float(rows["head"][:heads].sum() + rows["neuron"][:neurons].sum())
        for heads, neurons in product(range(1, 13), range(1, 21))
        if heads * costs["head"] + neurons * costs["neuron"] <= budget
    )
    kept = plan_of(groups, given, 0.5, layout="uniform", round_to=1, balance="none")
    worth = sum(float(given[name][positions].sum()) for name, positions in kept.items())
    next_rows = [
        (float(rows[kind][n]) / costs[kind], float(rows[kind][n]))
        for kind, n in (("head", len(kept["layers.0.heads"])), ("neuron", len(kept["layers.0.neurons"])))
        if n < len(rows[kind])
    ]
    assert best - max(next_rows)[1] - 1e-4 < worth <= best + 1e-4


def test_a_floor_of_one_layer_is_the_floor_of_all() -> None:
    groups = groups_of(layers=3)
    groups[2].floor = 5
    given = {group.name: torch.rand(group.num_units) * (group.kind == "neuron") for group in groups}
    kept = plan_of(groups, given, 0.5, layout="uniform")
    assert [len(kept[f"layers.{i}.heads"]) for i in range(3)] == [5, 5, 5]


def test_layers_of_different_size_are_refused() -> None:
    for change in ("fewer heads", "no heads in a layer", "another cost"):
        groups = groups_of(layers=3)
        if change == "fewer heads":
            groups[2].num_units = 11
        elif change == "another cost":
            groups[2].unit_cost = 195
        else:
            del groups[2]
        config = PruningConfig(target_sparsity=0.5, layout="uniform")
        with pytest.raises(ValueError, match="layout 'uniform' needs layers of equal size"):
            UnitSearch(total_of(groups), config).check(groups, total_of(groups))
        UnitSearch(total_of(groups), PruningConfig()).check(groups, total_of(groups))


def test_uniform_says_what_can_be_reached() -> None:
    groups = groups_of()
    config = PruningConfig(target_sparsity=0.95, layout="uniform")
    with pytest.raises(ValueError, match=r"target_sparsity 0.95 is not reachable; .* at most 0.8"):
        UnitSearch(total_of(groups), config).check(groups, total_of(groups))


@pytest.mark.parametrize(("name", "target"), [("bert", 0.3), ("llama_gqa", 0.5)])
def test_a_uniform_run_ends_with_equal_layers(name: str, target: float) -> None:
    """Of BERT neurons alone go, as no stock configuration of it can say fewer heads."""
    settings = {"target_sparsity": target, "layout": "uniform", "verify_events": True, **BRIEF}
    loop = Loop(name, patched(name), 30, **settings).take(30)
    counts = apt.summary(loop.model)
    assert len(set(counts.heads)) == len(set(counts.neurons)) == 1
    assert target <= counts.sparsity < target + 0.2
    assert (counts.heads[0] == 4) == (name == "bert")
    assert counts.sparsity == loop.run.events[-1].sparsity


@pytest.mark.parametrize("name", ["salience", "layout"])
def test_settings_that_are_one_of_a_few(name: str) -> None:
    with pytest.raises(ValueError, match=rf"pruning: {name} must be one of \['.*'\], got 'other'"):
        PruningConfig(**{name: "other"})
