"""Growth of ranks that goes its own way: without any pruning, between pruning events, before the first of them."""

import copy
from typing import Any

import torch
from own_loop import Loop, equal_bits, patched
from tiny_models import fill_adapters, tiny_batch

import apt
from apt.layers import adapted

ALONE = {"num_events": 0, "target_sparsity": 0.0, "tune_start": 4, "tune_end": 16, "num_tuning_events": 3}
APART = {"num_events": 2, "prune_start": 2, "prune_end": 18, "decay": 5, "settle": 1, "round_to": 1}  # at 10 and 18
GROWING = {"tune_start": 0, "tune_end": 21, "num_tuning_events": 3}  # at 7, 14 and 21


def steps_of(run: Any) -> tuple[list[int], list[int]]:
    """Steps of the events that prune, and of those that let ranks grow."""
    events = run.events
    return [e.step for e in events if e.prune is not None], [e.step for e in events if e.rank is not None]


def adapter_params(model: Any) -> int:
    return sum(m.rank * (m.n_in + m.n_out) for _, m in adapted(model) if m.rank)


def test_ranks_grow_without_any_pruning() -> None:
    model = patched("bert")
    start = adapter_params(model)
    loop = Loop("bert", model, 30, max_rank=1000, verify_events=True, **ALONE)
    for ratio in (2.0, 3.0, 4.0):
        loop.take(8 if ratio == 2.0 else 4)
        event = loop.run.events[-1]
        assert (event.prune, event.removed, event.sparsity, event.target_sparsity) == (None, 0.0, 0.0, 0.0)
        assert event.rank is not None
        assert event.rank.budget == int(ratio * start)
        widest = max(m.n_in + m.n_out for _, m in adapted(model))
        assert event.rank.budget - widest < adapter_params(model) <= event.rank.budget
    assert steps_of(loop.run) == ([], [8, 12, 16])
    assert not loop.run.active
    assert not loop.run.groups  # no gate was ever opened


def test_growth_between_pruning_events_leaves_falling_masks_alone() -> None:
    loop = Loop("bert", patched("bert"), 30, target_sparsity=0.6, verify_events=True, **APART, **GROWING).take(6)
    before = [group.mask.values.clone() for group in loop.run.groups]
    assert any(((mask > 0) & (mask < 1)).any() for mask in before)  # in the middle of a decay
    loop.take(1)
    assert loop.run.events[-1].prune is None
    assert all(group.mask.collecting for group in loop.run.groups)
    assert any(((g.mask.values > 0) & (g.mask.values < 1)).any() for g in loop.run.groups)
    loop.take(11)
    assert loop.run.active
    assert loop.run.importance.values
    assert not any(group.mask.collecting for group in loop.run.groups)  # ranks still grow, units no longer go
    loop.take(12)
    assert steps_of(loop.run) == ([10, 18], [7, 14, 21])
    assert [event.step for event in loop.run.events] == [7, 10, 14, 18, 21]
    assert 0.6 <= apt.summary(loop.model).sparsity < 0.65


def test_state_between_two_kinds_of_events() -> None:
    """Saved after pruning has ended and while ranks still grow: gates stay closed, and both go on alike."""
    settings: dict[str, Any] = {"target_sparsity": 0.6, **APART, **GROWING}
    first = Loop("bert", patched("bert"), 30, **settings).take(19)
    second = copy.deepcopy(first)
    again = apt.Controller(second.model, second.optimizer, 30, **settings)
    again.load_state_dict(copy.deepcopy(first.run.state_dict()))
    assert not any(group.mask.collecting for group in again.groups)
    second.run = again
    for loop in (first, second):
        torch.manual_seed(5)
        loop.take(11)
    assert steps_of(second.run) == steps_of(first.run) == ([10, 18], [7, 14, 21])
    assert equal_bits(second.model, first.model)


def test_ranks_grow_while_sparsity_warms_up() -> None:
    warm = {"prune_start": 0, "prune_end": 20, "num_events": 4, "sparsity_warmup": 12, "round_to": 1}
    loop = Loop("bert", patched("bert"), 30, target_sparsity=0.5, **warm).take(10)
    assert [event.removed for event in loop.run.events] == [0.0, 0.0]
    assert all(event.rank is not None and event.rank.ranks for event in loop.run.events)
    loop.take(10)
    assert [event.target_sparsity > 0.0 for event in loop.run.events] == [False, False, True, True]
    assert apt.summary(loop.model).sparsity >= 0.5


def test_growth_follows_pruning_unless_told_otherwise() -> None:
    plain = Loop("bert", patched("bert"), 30, target_sparsity=0.5, num_events=3, prune_end=0.6).take(20)
    assert steps_of(plain.run) == ([6, 12, 18], [6, 12, 18])
    none = Loop("bert", patched("bert"), 30, target_sparsity=0.5, num_events=3, prune_end=0.6, num_tuning_events=0)
    assert steps_of(none.take(20).run) == ([6, 12, 18], [])


def test_the_share_of_the_model_is_a_cap() -> None:
    model = patched("bert")
    before = apt.summary(model).params_before
    cap = int(1.5 * adapter_params(model))
    Loop("bert", model, 30, max_rank=1000, max_tuning_params_ratio=cap / before, **ALONE).take(30)
    assert cap - max(m.n_in + m.n_out for _, m in adapted(model)) <= adapter_params(model) <= cap


def test_rule_and_importance_reach_the_plans() -> None:
    plans = {}
    for settings in ({}, {"rule": "paper"}, {"importance": "elementwise"}):
        run = Loop("bert", patched("bert"), 30, max_rank=1000, **ALONE, **settings).take(8).run
        plans[str(settings)] = run.events[0].rank
    own, paper, elementwise = plans.values()
    assert set(paper.ranks.values()) == {2 * 3}  # floor(3 * budget / now), at twice the budget
    assert min(own.ranks.values()) > 2 * 3
    assert len(elementwise.ranks) == len(own.ranks)


def test_elementwise_importance_is_averaged_over_steps() -> None:
    loop = Loop("bert", fill_adapters(patched("bert")), 30, importance="elementwise", **ALONE)
    wanted: dict[str, float] = {}
    for _ in range(3):
        batch = tiny_batch("bert", seed=loop.step + 1)
        loop.model(**batch).loss.backward()
        for name, module in adapted(loop.model):
            if module.rank:
                now = (module.lora_B * module.lora_B.grad).abs().sum().item()
                wanted[name] = 0.85 * wanted.get(name, 0.0) + 0.15 * now
        loop.model.zero_grad()
        loop.take(1)
    assert loop.run.importance.values.keys() == wanted.keys()
    assert all(abs(float(value) - wanted[name]) < 1e-9 for name, value in loop.run.importance.values.items())
