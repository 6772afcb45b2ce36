"""Layers in the search, beside a slower statement of it; what is refused; what compressions, plans and pages tell."""

import dataclasses
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_search import plan_of
from tiny_models import tiny_batch, tiny_model
from tiny_run import write_config
from torch import Tensor
from unit_groups import FIXED, Group, total_of

import apt
from apt.families import anatomy_of
from apt.pruning import UnitSearch
from apt.pruning.prices import Prices
from apt.pruning.units import block_params
from apt.records import Event
from apt.runs.config import load_config
from apt.runs.estimate.dry_run import dry_run
from apt.runs.estimate.estimate import estimate
from apt.runs.report.tables import events_sheet
from apt.surgery.prune import apply_prune_plan

ALL = ("head", "neuron", "layer")
NORMS = 77  # what a layer costs beside its units


def layers_of(count: int = 5, *, units: bool = True, heads: int = 4, neurons: int = 9) -> list[Group]:
    """Layers that may go, and their heads and neurons."""
    inside = heads * 31 + neurons * 7
    groups = [
        Group(f"layers.{i}.layers", "layer", 1, NORMS + inside * (not units), 0, inside * units) for i in range(count)
    ]
    for i in range(count if units else 0):
        groups += [Group(f"layers.{i}.heads", "head", heads, 31), Group(f"layers.{i}.neurons", "neuron", neurons, 7)]
    return groups


def scores_of(groups: list[Group], seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {group.name: torch.rand(group.num_units) for group in groups}


def cost_of(groups: list[Group], kept: dict[str, list[int]]) -> int:
    """What is left; of a layer that went nothing."""
    left = {group.holder for group in groups if group.kind == "layer" and kept[group.name]}
    return sum(len(kept[group.name]) * group.cost() for group in groups if group.holder in left)


def slow_plan(groups: list[Group], scores: dict[str, Tensor], budget: float, balance: str) -> dict[str, list[int]]:
    """Units and layers in one list by falling density; each prefix counted out, without units of layers out."""
    values = {name: score.double() for name, score in scores.items()}
    density = {g.name: values[g.name] / g.whole_cost() for g in groups}
    if balance == "type":
        for kind in {group.kind for group in groups}:
            mine = [g.name for g in groups if g.kind == kind]
            mean = torch.cat([density[name] for name in mine]).mean()
            density |= {name: density[name] / mean for name in mine}
    elif len({group.kind for group in groups}) > 1:
        layers = [g.name for g in groups if g.kind == "layer"]
        salience = sum(values[g.name].sum() for g in groups if g.kind != "layer")
        density |= {name: density[name] * salience / sum(values[layer].sum() for layer in layers) for name in layers}
    best = max((g.name for g in groups if g.kind == "layer"), key=lambda name: float(density[name][0]))
    density[best] = torch.tensor([float("inf")])
    of_layer = {g.holder: float(density[g.name][0]) for g in groups if g.kind == "layer"}
    units = [
        (min(float(d), of_layer[g.holder]), g.kind == "layer", float(d), g.name, i)
        for g in groups
        for i, d in enumerate(density[g.name])
    ]
    units.sort(key=lambda unit: (-unit[0], not unit[1], -unit[2]))
    best_plan = {group.name: [] for group in groups}
    for end in range(len(units) + 1):
        kept: dict[str, list[int]] = {group.name: [] for group in groups}
        for _, _, _, name, i in units[:end]:
            kept[name].append(i)
        if cost_of(groups, kept) > budget:
            break
        best_plan = {name: sorted(positions) for name, positions in kept.items()}
    return best_plan


@pytest.mark.parametrize("balance", ["type", "none"])
@pytest.mark.parametrize("seed", range(6))
def test_a_layer_that_goes_takes_its_units_out(seed: int, balance: str) -> None:
    groups = layers_of()
    scores = scores_of(groups, seed)
    counts = []
    for sparsity in (0.05, 0.2, 0.35, 0.5, 0.65):
        budget = (1 - sparsity) * total_of(groups) - FIXED
        kept = plan_of(groups, scores, sparsity, round_to=1, balance=balance, unit_types=ALL)
        assert kept == slow_plan(groups, scores, budget, balance)
        for group in groups:
            assert not kept[group.name] or kept[f"{group.holder}.layers"]
        assert budget - (NORMS + 31) < cost_of(groups, kept) <= budget
        counts.append(sum(len(kept[f"layers.{i}.layers"]) for i in range(5)))
    assert all(more >= fewer for more, fewer in pairwise(counts))
    assert counts[0] > counts[-1] >= 1


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_a_mixture_is_chosen_by_no_scale_of_salience(scale: float) -> None:
    """Block influence has none of its own."""
    groups = layers_of()
    scores = scores_of(groups, 1)
    scaled = {name: score * (1.0 if name.endswith("layers") else scale) for name, score in scores.items()}
    for balance in ("type", "none"):
        settings: Any = {"round_to": 1, "balance": balance, "unit_types": ALL}
        assert plan_of(groups, scores, 0.5, **settings) == plan_of(groups, scaled, 0.5, **settings)


@pytest.mark.parametrize("count", [3, 7, 10, 12, 30])
@pytest.mark.parametrize("layout", ["free", "uniform"])
def test_layers_alone_go_one_by_one(count: int, layout: str) -> None:
    """At each share of equal layers exactly so many go, the ones of least influence, and the last stays."""
    groups = layers_of(count, units=False)
    scores = scores_of(groups, 0)
    total = sum(group.cost() for group in groups)
    order = sorted(range(count), key=lambda i: float(scores[f"layers.{i}.layers"][0]))
    for gone in range(count):
        config = apt.pruning.PruningConfig(unit_types=("layer",), layout=layout)
        kept = UnitSearch(total, config).plan(groups, scores, total, 1, gone / count).kept
        assert [i for i in range(count) if not kept[f"layers.{i}.layers"]] == sorted(order[:gone])


def test_floors_of_layers() -> None:
    groups = layers_of(4)
    groups[2] = dataclasses.replace(groups[2], floor=1)
    scores = scores_of(groups, 0)
    scores["layers.2.layers"] = torch.zeros(1)
    for least, left in ((1, 1), (3, 3)):
        settings: Any = {"target_sparsity": 0.0, "min_layers": least, "unit_types": ALL, "min_heads": 2, "round_to": 1}
        config = apt.pruning.PruningConfig(**settings)
        search = UnitSearch(total_of(groups), config)
        most = 1 - (FIXED + left * NORMS) / total_of(groups)
        search = UnitSearch(total_of(groups), dataclasses.replace(config, target_sparsity=most - 1e-6))
        search.check(groups, total_of(groups))
        kept = search.plan(groups, scores, total_of(groups), 1, most - 1e-6).kept
        layers = [i for i in range(4) if kept[f"layers.{i}.layers"]]
        assert len(layers) == left
        assert 2 in layers
        too_much = UnitSearch(total_of(groups), dataclasses.replace(config, target_sparsity=most + 1e-3))
        with pytest.raises(ValueError, match=rf"min_layers={least} at most .* can go"):
            too_much.check(groups, total_of(groups))


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"target_speedup": 2.0}, "target_speedup prices heads and neurons; leave 'layer' out"),
        ({"salience": "magnitude"}, "layers go by block influence, which salience 'magnitude' takes no data for"),
        ({"layout": "uniform", "unit_types": ALL}, "layout 'uniform' knows layers alone or not at all"),
        ({"min_layers": 0}, "round_to, min_hidden and min_layers must be at least 1"),
        ({"method": "dynacsg", "prune": True}, "gates of method 'dynacsg' count layers"),
    ],
)
def test_what_is_not_built_is_refused(settings: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        apt.APTConfig().with_overrides(**{"unit_types": ("layer",), **settings})


@pytest.mark.parametrize(
    ("name", "settings", "why"),
    [
        ("gpt2", {}, "whole layers of gpt2 with scale_attn_by_inverse_layer_idx=True cannot go"),
        ("deberta", {"conv_kernel_size": 3}, "whole layers of deberta-v2 with conv_kernel_size=3 cannot go"),
    ],
)
def test_layers_that_are_counted_are_refused_before_anything_changes(
    name: str, settings: dict[str, Any], why: str
) -> None:
    model = tiny_model(name, **settings)
    before = str(model)
    with pytest.raises(ValueError, match=why):
        apt.patch_model(model, unit_types=("head", "layer"))
    assert str(model) == before


def test_methods_that_count_layers_want_a_model_without_gaps(tmp_path: Path) -> None:
    batches = [tiny_batch("llama", seed=seed) for seed in range(3)]
    model = apt.unpatch_model(apt.compress(tiny_model("llama"), batches, 0.3, unit_types=["layer"]), merge=True)
    for method in ("prefix_tuning", "dynacsg"):
        with pytest.raises(ValueError, match=rf"method '{method}' counts layers, and layers.\d of this model went"):
            apt.patch_model(model, method=method)
    # Without units in its state it is still exported as what it is.
    small = apt.load_model(apt.export_model(apt.patch_model(model, method="lora"), tmp_path / "small"))
    apt.patch_model(small, method="prefix_tuning")
    assert small.config.num_hidden_layers == 2


@pytest.mark.parametrize("name", ["bert", "llama_gqa", "t5"])
def test_a_compression_takes_layers_alone_and_among_others(name: str, tmp_path: Path) -> None:
    batches = [tiny_batch(name, seed=seed) for seed in range(4)]
    deep: Any = {"num_hidden_layers": 6, "num_decoder_layers": 3} if name == "t5" else {"num_hidden_layers": 6}
    given: Any = {"round_to": 1, "calibration_batches": 4, "moment_batches": 4}
    model = apt.compress(tiny_model(name, **deep), batches, 0.3, unit_types=["layer"], **given)
    counts = apt.summary(model)
    assert counts.sparsity >= 0.3
    left = sum(counts.layers.values())
    assert f"layers      {left} of {len(counts.layers)}" in str(counts)
    apt.export_model(model, tmp_path / "small")
    assert json.loads((tmp_path / "small/apt_export.json").read_text())["stock"] is True
    assert f"| layers left | {left} of {len(counts.layers)} |" in (tmp_path / "small/README.md").read_text()
    assert model._apt.past[-1].prune.repair == {}

    mixed = apt.compress(tiny_model(name, **deep), batches, 0.8, unit_types=list(ALL), **given)
    event = mixed._apt.past[-1]
    gone = {layer for layer, stays in apt.summary(mixed).layers.items() if not stays}
    assert gone
    assert event.prune.repair
    assert not any(key.rpartition(".")[0] in gone for key in event.prune.repair)
    assert all(not event.prune.kept[key] for key in event.prune.kept if key.rpartition(".")[0] in gone)
    row = Event.from_json(json.loads(json.dumps(event.to_json())))
    sheet = events_sheet([row])
    assert sheet.headers[3:6] == ("layers left", "heads left", "neurons left")
    assert sheet.rows[0][3] == str(len(apt.summary(mixed).layers) - len(gone))


def test_a_plan_tells_its_layers(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path), ["train_size=192", "unit_types=[head, neuron, layer]"])
    assert "layers       1 x 2" in str(dry_run(config))
    assert estimate(config, baseline=False).run_over_lora > 0


@pytest.mark.parametrize("name", ["bert", "llama_bias", "gemma2", "t5_gated"])
def test_what_a_plan_of_all_kinds_costs_is_exact(name: str) -> None:
    """Layers, the units in them and the dimensions across them; attentions without heads too."""
    settings: Any = {"num_decoder_layers": 3} if name == "t5_gated" else {}
    model = apt.patch_model(tiny_model(name, **settings), prune=True)
    anatomy = anatomy_of(model)
    config = apt.pruning.PruningConfig(unit_types=("head", "neuron", "hidden", "layer"), round_to=1, min_hidden=1)
    for seed, sparsity in ((1, 0.35), (2, 0.6)):
        groups = apt.pruning.UnitScores(anatomy, config).groups
        live = block_params(anatomy)
        scores = scores_of(groups, seed)
        free = [group.name for group in groups if group.kind == "layer" and not group.floor]
        scores |= {key: scores[key] * 1e-3 for key in free[-1:]}
        plan = UnitSearch(live, config).plan(groups, scores, live, 1, sparsity)
        prices = Prices.of([[group] for group in groups])
        counts = ([group.num_units for group in groups], [len(plan.kept[group.name]) for group in groups])
        before, after = (int(prices.running_cost(np.arange(len(groups)), np.array(each))[-1]) for each in counts)
        apply_prune_plan(model, plan)
        assert block_params(anatomy) == live - before + after <= (1 - sparsity) * live
    assert anatomy.gone
