"""Units: exact costs, in every family, whole and shrunk, and the floors that decoders need."""

from dataclasses import replace

import pytest
import torch
from tiny_models import MODELS, NAMES, SEQ2SEQ, random_plan, tiny_model
from torch import nn

import apt
from apt.families import anatomy_of, base_model, find_family
from apt.pruning.units import block_params, find_units
from apt.surgery.prune import apply_prune_plan

ENCODERS = ("bert", "bert_mlm", "roberta", "deberta", "distilbert")
TWO_ATTENTIONS = ("qwen2_mixed", "gemma2", "gemma3")  # sliding and full layers


def roles(model: nn.Module) -> list[str]:
    """Those that the family's table names."""
    stacks = find_family(model).stacks
    return list(dict.fromkeys(role for stack in stacks for part in stack.parts for role in part.linears))


def live_params(model: nn.Module) -> int:
    """Every number inside the layers but the adapters'."""
    layers = [layer.module for layer in anatomy_of(model).layers]
    return sum(p.numel() for layer in layers for name, p in layer.named_parameters() if "lora_" not in name)


@pytest.mark.parametrize("name", NAMES)
def test_block_params_are_what_lies_inside_the_layers(name: str) -> None:
    model = tiny_model(name)
    wanted = live_params(model)
    assert block_params(anatomy_of(model)) == wanted  # a plain model has no adapters to leave out
    model = apt.patch_model(model, rank=3, target_modules=roles(model))
    assert block_params(anatomy_of(model)) == wanted


@pytest.mark.parametrize("name", NAMES)
def test_cost_of_a_unit_is_what_goes_with_it(name: str) -> None:
    """Removing one unit of one group frees exactly its cost; a second time too, at the sizes of then."""
    model = apt.patch_model(tiny_model(name))
    anatomy = anatomy_of(model)
    for seed in (1, 2):
        for group in find_units(anatomy):
            if group.num_units > group.floor + 1:
                before, cost = live_params(model), group.cost()
                kept = {group.name: list(range(1, group.num_units))}
                apply_prune_plan(model, replace(random_plan(model, seed=seed), kept=kept))
                assert before - live_params(model) == cost == before - block_params(anatomy), group.name
        apply_prune_plan(model, random_plan(model, seed=seed))


@pytest.mark.parametrize("name", NAMES)
def test_units_and_what_stays_add_up(name: str) -> None:
    model = apt.patch_model(tiny_model(name))
    anatomy = anatomy_of(model)
    groups = find_units(anatomy)
    layers = nn.ModuleList(layer.module for layer in anatomy.layers)
    prunable = {id(module) for group in groups for module in (member.linear for member in group.members)}
    stays = 0
    for module in layers.modules():
        if id(module) not in prunable:
            stays += sum(p.numel() for p in module.parameters(recurse=False))
    out_biases = [m.linear.bias for group in groups for m in group.members if m.axis == "in"]
    stays += sum(bias.numel() for bias in out_biases if bias is not None)
    assert sum(group.num_units * group.cost() for group in groups) + stays == live_params(model)


def test_costs_by_hand() -> None:
    """d = 32: BERT has 4 heads of 8 and biases; grouped Llama 4 groups of 2 query heads of 4; T5 heads of 6."""
    models = [apt.patch_model(tiny_model(name)) for name in ("bert", "llama_gqa", "t5", "t5_gated")]
    costs = [{group.kind: group.cost() for group in find_units(anatomy_of(model))} for model in models]
    assert costs[0] == {"head": 4 * 32 * 8 + 3 * 8, "neuron": 2 * 32 + 1}
    assert costs[1] == {"head": 32 * (2 * 8 + 2 * 4), "neuron": 3 * 32}
    assert costs[2] == {"head": 4 * 32 * 6, "neuron": 2 * 32}
    assert costs[3] == {"head": 4 * 32 * 6, "neuron": 3 * 32}


@pytest.mark.parametrize("name", NAMES)
def test_names_order_and_members(name: str) -> None:
    model = apt.patch_model(tiny_model(name))
    groups = find_units(anatomy_of(model))
    layers = MODELS[name].settings.get("num_hidden_layers", 3)
    wanted = [f"layers.{i}.{kind}" for i in range(layers) for kind in ("heads", "neurons")]
    if name in SEQ2SEQ:
        wanted = [f"encoder.{i}.{kind}" for i in range(3) for kind in ("heads", "neurons")]
        wanted += [f"decoder.{i}.{kind}" for i in range(2) for kind in ("heads", "cross_heads", "neurons")]
    assert [group.name for group in groups] == wanted
    gated = "gate" in roles(model)
    for group in groups:
        assert len(group.members) == (4 if group.kind == "head" else 2 + gated)
        assert [member.axis for member in group.members][-1] == "in"
        assert len({id(member.linear) for member in group.members}) == len(group.members)
        for member in group.members:
            live = member.linear.n_out if member.axis == "out" else member.linear.n_in
            assert live == member.width * group.num_units


@pytest.mark.parametrize("name", NAMES)
def test_decoders_keep_a_group_in_the_first_layer_of_each_attention_type(name: str) -> None:
    model = apt.patch_model(tiny_model(name))
    layers = {0, 1} if name in TWO_ATTENTIONS else set() if name in ENCODERS else {0}
    wanted = {f"layers.{index}.heads" for index in layers}
    if name in SEQ2SEQ:
        wanted = {"decoder.0.heads", "decoder.1.cross_heads"}
    assert anatomy_of(model).required_heads() == wanted
    floors = {group.name: group.floor for group in find_units(anatomy_of(model))}
    assert {key for key, floor in floors.items() if floor} == wanted
    raised = find_units(anatomy_of(model), {"head": 2, "neuron": 7})
    assert {group.floor for group in raised if group.kind == "head"} == {2}
    assert {group.floor for group in raised if group.kind == "neuron"} == {7}
    capped = find_units(anatomy_of(model), {"head": 99, "neuron": 99})
    assert all(group.floor == group.num_units for group in capped)


def test_a_group_that_lost_everything_is_no_group() -> None:
    model = apt.patch_model(tiny_model("llama"))
    apply_prune_plan(model, random_plan(model, empty=["layers.1.heads", "layers.2.neurons"], seed=1))
    names = {group.name for group in find_units(anatomy_of(model))}
    assert {"layers.1.heads", "layers.2.neurons"}.isdisjoint(names)
    assert len(names) == 4


def test_the_base_model_alone_has_the_same_units() -> None:
    model = apt.patch_model(base_model(tiny_model("bert")).to(torch.float32))
    assert len(find_units(anatomy_of(model))) == 6
