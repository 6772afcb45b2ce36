"""Masked equals shrunk, for every family; growth leaves the output; the optimizer's moments follow."""

import copy
import json
from typing import Any

import pytest
import torch
from check import Unrounded, close
from tiny_models import (
    GENERATORS,
    NAMES,
    SEQ2SEQ,
    fill_adapters,
    free_heads,
    random_plan,
    set_masks,
    tiny_batch,
    tiny_model,
)
from torch import Tensor, nn

import apt
from apt.families import anatomy_of
from apt.layers import APTAdapter, adapted
from apt.pruning.units import Member, find_units
from apt.records import Event, PrunePlan, RankPlan
from apt.surgery.event import apply_event
from apt.surgery.prune import apply_prune_plan
from apt.surgery.ranks import apply_rank_plan

EVERYWHERE = ("q", "k", "v", "o", "up", "down")
ATTENTION, FFN = "layers.0.heads", "layers.0.neurons"


def patched(name: str, **settings: Any) -> Any:
    """Adapters everywhere, with a B that is not zero."""
    return fill_adapters(apt.patch_model(tiny_model(name, **settings), rank=3, target_modules=EVERYWHERE))


def responses(model: Any, name: str) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of a random upstream at the input embeddings."""
    batch, embed = tiny_batch(name), model.get_input_embeddings()
    inputs = {"inputs_embeds": embed(batch["input_ids"]), "attention_mask": batch["attention_mask"]}
    if name in SEQ2SEQ:
        inputs["decoder_inputs_embeds"] = embed(model.prepare_decoder_input_ids_from_labels(batch["labels"]))
        inputs["decoder_attention_mask"] = (batch["labels"] != -100).long()
    leaves = [tensor.detach_().requires_grad_() for key, tensor in inputs.items() if key.endswith("embeds")]
    with Unrounded():
        logits = model(**inputs, use_cache=False).logits
    upstream = torch.randn(logits.shape, dtype=logits.dtype, generator=torch.Generator().manual_seed(7))
    gradients = torch.autograd.grad(logits, leaves, upstream)
    return logits.detach(), torch.cat([gradient.flatten() for gradient in gradients])


def same(what: str, got: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    for name, ours, theirs in zip(("logits", "gradient"), got, wanted, strict=True):
        close(f"{what}: {name}", ours, theirs)


def features(member: Member, positions: list[int]) -> list[int]:
    return [position * member.width + offset for position in positions for offset in range(member.width)]


def sizes(model: nn.Module) -> dict[str, tuple[int, int]]:
    return {name: (module.n_out, module.n_in) for name, module in adapted(model)}


def groups_of(model: nn.Module) -> dict[str, Any]:
    return {group.name: group for group in find_units(anatomy_of(model))}


def first_adapter(model: nn.Module, group: str, axis: str) -> tuple[str, APTAdapter, Member]:
    member = next(member for member in groups_of(model)[group].members if member.axis == axis)
    name = next(name for name, module in adapted(model) if module is member.linear)
    return name, member.linear, member


@pytest.mark.filterwarnings("ignore:`inputs_embeds`")
@pytest.mark.parametrize("keep_tail", [False, True], ids=["freed", "tail kept"])
@pytest.mark.parametrize("name", NAMES)
def test_masked_equals_shrunk(name: str, keep_tail: bool) -> None:
    model = patched(name)
    heads, neurons = free_heads(model), [name for name in groups_of(model) if name.endswith("neurons")]
    events = [
        {"empty": [heads[-1], neurons[0]], "seed": 1},
        {"empty": [*heads, neurons[-1]], "seed": 2},  # the last attention that may go is gone by now
    ]
    for number, event in enumerate(events, 1):
        plan = random_plan(model, **event)
        whole = responses(model, name)
        set_masks(model, plan)
        masked = responses(model, name)
        assert (masked[0] - whole[0]).abs().max() > 1e-2  # otherwise nothing is tested
        apply_prune_plan(model, plan, keep_tail=keep_tail)
        same(f"event {number}", responses(model, name), masked)
    counts = apt.summary(model)
    assert {name for name, count in counts.units.items() if not count} == {*heads, neurons[0], neurons[-1]}
    assert counts.masked == 0


def test_tail_holds_what_was_cut_in_its_old_order() -> None:
    model = patched("llama_bias")
    inside = [(name, module) for name, module in adapted(model) if module.bias is not None]  # not the head
    before = {name: (module.weight.clone(), module.bias.clone()) for name, module in inside}
    plan = random_plan(model, seed=1)
    orders = {}
    for name, group in groups_of(model).items():
        cut = sorted(set(range(group.num_units)) - set(plan.kept[name]))
        for member in group.members:
            orders[member.linear, member.axis] = features(member, plan.kept[name]) + features(member, cut)
    apply_prune_plan(model, plan, keep_tail=True)
    for name, module in inside:
        weight, bias = before[name]
        rows = orders.get((module, "out"), list(range(len(weight))))
        columns = orders.get((module, "in"), list(range(weight.shape[1])))
        assert torch.equal(module.weight, weight[rows][:, columns]), name
        assert torch.equal(module.bias, bias[rows]), name
    # A second event moves the first tail nowhere.
    group = groups_of(model)[FFN]
    down = group.members[-1].linear
    tail = down.weight[:, down.n_in :].clone()
    apply_prune_plan(model, random_plan(model, seed=2), keep_tail=True)
    assert torch.equal(down.weight[:, -tail.shape[1] :], tail)


@pytest.mark.parametrize("keep_tail", [False, True], ids=["freed", "tail kept"])
def test_a_plan_that_keeps_all_changes_no_bit(keep_tail: bool) -> None:
    model = patched("llama_gqa")
    before = copy.deepcopy(model.state_dict())
    kept = {name: list(range(group.num_units)) for name, group in groups_of(model).items()}
    apply_prune_plan(model, PrunePlan(step=1, target_sparsity=0.0, kept=kept, round_to=1), keep_tail=keep_tail)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, before[key]) for key, tensor in after.items())


@pytest.mark.parametrize("every", [1, 2], ids=["all that may go", "every other"])
@pytest.mark.parametrize("name", GENERATORS)
def test_cached_generation_with_empty_attention(name: str, every: int) -> None:
    model = patched(name)
    apply_prune_plan(model, random_plan(model, empty=free_heads(model)[::every], seed=1))
    ids = tiny_batch(name)["input_ids"][::4, :6]  # a row without padding
    settings = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    cached, plain = (
        model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=use, **settings) for use in (True, False)
    )
    assert cached.sequences.shape[1] == 8 + (1 if name in SEQ2SEQ else 6)  # far past a sliding window of 4
    assert torch.equal(cached.sequences, plain.sequences)
    for ours, theirs in zip(cached.logits, plain.logits, strict=True):
        close("logits of a step", ours, theirs)


@pytest.mark.parametrize("name", GENERATORS)
def test_a_step_with_a_cache_is_a_step_without(name: str) -> None:
    """By hand, several tokens at a time, with every attention empty that may be."""
    model = patched(name)
    apply_prune_plan(model, random_plan(model, empty=free_heads(model), seed=1))
    ids, source = tiny_batch(name, seed=4)["input_ids"][::4], tiny_batch(name)["input_ids"][::4]  # without padding
    fixed: dict[str, Any] = {}
    if name in SEQ2SEQ:
        fixed = {"encoder_outputs": model.get_encoder()(source), "attention_mask": torch.ones_like(source)}
    key = "decoder_input_ids" if fixed else "input_ids"
    with Unrounded():
        whole = model(**fixed, **{key: ids}, use_cache=False).logits
        cache, parts = None, []
        for chunk in ids.split(4, dim=1):
            step = model(**fixed, **{key: chunk}, past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            parts.append(step.logits)
    assert len(parts) == 3
    close("logits", torch.cat(parts, dim=1), whole)


@pytest.mark.parametrize("name", NAMES)
def test_growth_leaves_the_output(name: str) -> None:
    model = patched(name)
    before = responses(model, name)
    ranks = {key: 3 + index % 4 for index, (key, _) in enumerate(adapted(model)) if index % 4}
    ranks = {key: rank for key, rank in ranks.items() if dict(adapted(model))[key].rank}
    apply_rank_plan(model, RankPlan(step=1, budget=0, ranks=ranks))
    assert {key: dict(adapted(model))[key].rank for key in ranks} == ranks
    same("growth", responses(model, name), before)


OPTIMIZERS = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    "AMSGrad": lambda parameters: torch.optim.Adam(parameters, lr=1e-2, amsgrad=True),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9),
}


def trained(make: Any, name: str = "llama_gqa", steps: int = 3) -> tuple[Any, torch.optim.Optimizer]:
    """A model and its optimizer after some steps, the gradient of the last one still there."""
    model = patched(name)
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    for step in range(steps):
        optimizer.zero_grad()
        model(**tiny_batch(name, seed=step)).loss.backward()
        optimizer.step()
    return model, optimizer


def moments(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    state = optimizer.state[parameter].items()
    return {key: value.clone() for key, value in state if isinstance(value, Tensor) and value.dim()}


@pytest.mark.parametrize(
    ("group", "axis", "dim"), [(ATTENTION, "out", 0), (FFN, "out", 0), (ATTENTION, "in", 1), (FFN, "in", 1)]
)
@pytest.mark.parametrize("make", OPTIMIZERS)
def test_moments_and_gradients_of_what_stays_stay(make: str, group: str, axis: str, dim: int) -> None:
    model, optimizer = trained(OPTIMIZERS[make])
    _, linear, member = first_adapter(model, group, axis)
    parameter = linear.lora_B if axis == "out" else linear.lora_A
    before, old, grad = moments(optimizer, parameter), parameter.detach().clone(), parameter.grad.clone()
    counted, settings = optimizer.state[parameter].get("step"), {**optimizer.param_groups[0], "params": None}
    plan = random_plan(model, seed=1)
    index = torch.tensor(features(member, plan.kept[group]))
    apply_prune_plan(model, plan, optimizer)
    assert torch.equal(parameter, old.index_select(dim, index))
    assert torch.equal(parameter.grad, grad.index_select(dim, index))
    assert before
    for key, value in before.items():
        assert torch.equal(optimizer.state[parameter][key], value.index_select(dim, index)), key
    assert optimizer.state[parameter].get("step") == counted
    assert {**optimizer.param_groups[0], "params": None} == settings
    optimizer.step()


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_new_ranks_get_no_momentum_and_the_mean_second_moment(make: str) -> None:
    model, optimizer = trained(OPTIMIZERS[make])
    name, linear, _ = first_adapter(model, FFN, "out")
    both = [(linear.lora_A, 0), (linear.lora_B, 1)]
    before = [moments(optimizer, parameter) for parameter, _ in both]
    counted = optimizer.state[linear.lora_A].get("step")
    apply_rank_plan(model, RankPlan(step=1, budget=0, ranks={name: 5}), optimizer)
    assert not linear.lora_B[:, 3:].any()
    for (parameter, dim), old in zip(both, before, strict=True):
        assert old
        for key, value in old.items():
            surviving, new = optimizer.state[parameter][key].split([3, 2], dim)
            assert torch.equal(surviving, value), key
            start = value.mean(dim, keepdim=True) if key.endswith("_sq") else torch.zeros(1, 1, dtype=value.dtype)
            close(key, new.clone(), start.expand(new.shape).clone())
        assert parameter.grad.shape == parameter.shape
        assert optimizer.state[parameter].get("step") == counted
    optimizer.step()


def test_the_optimizer_forgets_the_adapters_of_an_empty_layer() -> None:
    model, optimizer = trained(OPTIMIZERS["AdamW"])
    apply_prune_plan(model, random_plan(model, empty=["layers.1.heads", "layers.2.neurons"], seed=1), optimizer)
    live = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == live
    assert {id(p) for p in optimizer.state} == live
    model(**tiny_batch("llama_gqa")).loss.backward()
    optimizer.step()


def test_an_optimizer_that_cannot_follow_is_refused_by_name_before_anything_is_cut() -> None:
    model, optimizer = trained(torch.optim.Adafactor)
    before = sizes(model)
    with pytest.raises(ValueError, match=r"surgery: Adafactor .*; use AdamW, Adam or SGD"):
        apply_prune_plan(model, random_plan(model, seed=1), optimizer)
    assert sizes(model) == before


def test_works_while_the_graph_of_the_last_step_is_alive() -> None:
    model, optimizer = trained(OPTIMIZERS["AdamW"], "bert")
    loss = model(**tiny_batch("bert")).loss
    loss.backward()  # the loop's variable keeps the graph
    name, _, _ = first_adapter(model, FFN, "out")
    apply_prune_plan(model, random_plan(model, seed=1), optimizer)
    apply_rank_plan(model, RankPlan(step=1, budget=0, ranks={name: 5}), optimizer)
    optimizer.step()
    optimizer.zero_grad()
    model(**tiny_batch("bert")).loss.backward()
    assert all(p.grad.shape == p.shape for p in model.parameters() if p.requires_grad)
    assert loss.grad_fn is not None


@pytest.mark.parametrize(
    ("kept", "words"),
    [
        ({"layers.9.heads": [0]}, r"the plan of step 3 names layers\.9\.heads, which this model does not have"),
        ({ATTENTION: [0], FFN: [0, 99]}, r"layers\.0\.neurons has 40 units; kept positions must ascend"),
        ({ATTENTION: [0], FFN: [1, 0]}, r"layers\.0\.neurons has 40 units; kept positions must ascend"),
        ({ATTENTION: [0], FFN: [-1, 0]}, r"layers\.0\.neurons has 40 units; kept positions must ascend"),
    ],
    ids=["unknown group", "too high", "not ascending", "negative"],
)
def test_a_plan_of_another_model_is_refused_before_anything_is_cut(kept: dict[str, list[int]], words: str) -> None:
    model = patched("bert")
    before = sizes(model)
    with pytest.raises(ValueError, match=words):
        apply_prune_plan(model, PrunePlan(step=3, target_sparsity=0.5, kept=kept, round_to=1))
    assert sizes(model) == before


@pytest.mark.parametrize(
    ("ranks", "words"),
    [({"nowhere": 9}, "step 3 names adapter nowhere"), ({"first": 3}, "new_rank must be above the present rank 3")],
    ids=["unknown adapter", "no growth"],
)
def test_a_rank_plan_that_does_not_fit_is_refused(ranks: dict[str, int], words: str) -> None:
    model = patched("bert")
    first, _ = next(adapted(model))
    ranks = {first if name == "first" else name: rank for name, rank in ranks.items()}
    with pytest.raises(ValueError, match=words):
        apply_rank_plan(model, RankPlan(step=3, budget=0, ranks=ranks))


def test_events_survive_json_and_replay_on_a_fresh_model() -> None:
    model, twin = patched("llama_gqa"), patched("llama_gqa")
    name, _, _ = first_adapter(model, FFN, "out")
    numbers = {"target_sparsity": 0.5, "sparsity": 0.4, "removed": 0.4, "block_params": 1, "trainable_params": 1}
    plan, growth = random_plan(model, empty=["layers.1.heads"], seed=1), RankPlan(step=1, budget=9, ranks={name: 7})
    event = Event(step=1, prune=plan, rank=growth, seconds=0.1, **numbers)
    again = Event.from_json(json.loads(json.dumps(event.to_json())))
    assert again == event
    apply_event(model, event)
    apply_event(twin, again)
    assert {k: v.shape for k, v in twin.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    same("replay", responses(twin, "llama_gqa"), responses(model, "llama_gqa"))
