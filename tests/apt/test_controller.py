"""A run: what it changes, what it leaves alone bit for bit, when, and what it refuses."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from check import close
from own_loop import BRIEF, ONCE, Loop, equal_bits, patched
from tiny_models import fill_adapters, tiny_batch, tiny_model
from torch import Tensor

import apt
import apt_kernels
from apt.files.whole import read_jsonl
from apt.layers import adapted
from apt.layers.around import around_of
from apt.pruning.salience import SALIENCES
from apt.records import Event, Plan
from apt.surgery.event import ACTS, Act, apply_event
from apt.surgery.prune import apply_prune_plan


def masks_of(run: apt.Controller) -> Tensor:
    return torch.cat([group.mask.values.clone() for group in run.groups])


NOTHING = {
    "no events": {"num_events": 0, "target_sparsity": 0.0},
    "events that do nothing": {"target_sparsity": 0.0, "adaptive_rank_update": False, "verify_events": True, **BRIEF},
}


@pytest.mark.parametrize("settings", NOTHING.values(), ids=NOTHING)
@pytest.mark.parametrize("name", ["bert", "llama_gqa"])
def test_a_controller_that_does_nothing_changes_no_bit(name: str, settings: dict[str, Any]) -> None:
    start = patched(name, torch.float32, dropout=0.1 if name == "bert" else 0.0)
    torch.manual_seed(3)
    plain = Loop(name, copy.deepcopy(start), 0).take(20)
    torch.manual_seed(3)
    ours = Loop(name, copy.deepcopy(start), 30, **settings).take(20)
    assert len(ours.run.events) == settings["num_events"]
    assert equal_bits(ours.model, plain.model)
    assert not equal_bits(ours.model, start)


def test_lora_has_no_events() -> None:
    loop = Loop("bert", patched("bert", method="lora"), 30).take(2)
    assert (loop.run.active, loop.run.events, loop.run.groups) == (False, [], [])


@pytest.mark.parametrize("name", ["bert", "llama_gqa", "qwen2_mixed"])
def test_a_run_reaches_its_target(name: str, tmp_path: Path) -> None:
    settings = {"target_sparsity": 0.6, "verify_events": True, "event_log": tmp_path / "events.jsonl", **BRIEF}
    loop = Loop(name, patched(name), 30, **settings).take(30)
    run, counts = loop.run, apt.summary(loop.model)
    assert [event.step for event in run.events] == [6, 12, 18]
    unit = max(max(group.cost() for group in run.groups), 4 * 97) / run.pruning.goal.params_total
    for event in run.events:
        assert event.target_sparsity <= event.sparsity <= event.target_sparsity + unit
    assert 0.6 <= counts.sparsity <= 0.6 + unit
    assert counts.sparsity == run.events[-1].sparsity
    assert sum(event.removed for event in run.events) == pytest.approx(counts.sparsity)
    assert all(count % 4 == 0 for count in counts.neurons)
    assert [Event.from_json(row) for row in read_jsonl(tmp_path / "events.jsonl")] == run.events
    listed = {id(p) for group in loop.optimizer.param_groups for p in group["params"]}
    assert listed == {id(p) for p in loop.model.parameters() if p.requires_grad}


@pytest.mark.parametrize("settle", [0, 0.2])
def test_masks_that_fall_until_the_event_are_settled_by_it(settle: float) -> None:
    settings = {"num_events": 2, "prune_start": 0, "prune_end": 8, "decay": 3, "settle": settle, "round_to": 4}
    loop = Loop("llama_gqa", patched("llama_gqa"), 20, target_sparsity=0.3, **settings).take(20)
    assert [event.step for event in loop.run.events] == [4, 8]
    assert apt.summary(loop.model).masked == 0
    assert 0.3 <= loop.run.events[-1].sparsity <= 0.35


@pytest.mark.parametrize("salience", [name for name in SALIENCES if name != "obs"])  # that goes with a repair
def test_every_salience_ranks_the_units_of_a_run(salience: str) -> None:
    loop = Loop("bert", patched("bert"), 40, target_sparsity=0.5, salience=salience, **ONCE).take(20)
    assert 0.5 <= loop.run.events[0].sparsity <= 0.55
    masks = [group.mask for group in loop.run.groups]
    assert all(mask.products == (salience in ("sum_of_products", "gate_taylor")) for mask in masks)
    assert all(mask.squares == (salience == "fisher") for mask in masks)


def test_ranks_follow_their_budget() -> None:
    model = patched("llama_gqa")
    start = sum(m.rank * (m.n_in + m.n_out) for _, m in adapted(model))
    loop = Loop("llama_gqa", model, 30, target_sparsity=0.3, max_rank=1000, **BRIEF)
    for event in range(3):
        loop.take(6)
        plan = loop.run.events[event].rank
        assert plan is not None
        assert plan.budget == int(start * (1.0 + 3.0 * (6 * (event + 1)) / 18))
        now = [(m.rank, m.n_in + m.n_out) for _, m in adapted(model) if m.rank]
        assert plan.budget - max(width for _, width in now) < sum(rank * width for rank, width in now) <= plan.budget


def test_importance_starts_anew_after_an_event_and_salience_goes_on() -> None:
    loop = Loop("bert", patched("bert"), 30, target_sparsity=0.5, **BRIEF).take(5)
    assert loop.run.importance.values
    loop.take(1)
    assert loop.run.importance.values == {}
    sizes = {group.name: group.num_units for group in loop.run.groups}
    assert {name: len(values) for name, values in loop.run.pruning.salience.values.items() if name in sizes} == sizes


def test_an_event_that_moves_the_logits_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(model: Any, plan: Any, optimizer: Any, **settings: Any) -> None:
        apply_prune_plan(model, plan, optimizer, **settings)
        model.classifier.bias.data[0] += 1e-6

    monkeypatch.setattr("apt.surgery.event.apply_prune_plan", careless)
    loop = Loop("bert", patched("bert"), 30, target_sparsity=0.5, verify_events=True, **BRIEF).take(5)
    with pytest.raises(RuntimeError, match=r"the event of step 6 moved a logit by 1\.00e-06"):
        loop.take(1)


def base_run(model: Any, call: Any, steps: int) -> None:
    """A loop around the hidden states of a base model, as sentence encoders are trained, up to an event at step 6."""
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    run = apt.Controller(model, optimizer, 30, target_sparsity=0.5, verify_events=True, **BRIEF)
    for step in range(steps):
        batch = {name: value for name, value in tiny_batch("bert", seed=step).items() if name != "labels"}
        run.loss(call(**batch)[0].square().mean()).backward()
        run.after_backward()
        optimizer.step()
        run.after_step()
        optimizer.zero_grad()


def test_an_event_is_checked_whoever_calls_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its forward, as sentence-transformers does, without a batch for the loss; a call of a part is told."""

    def careless(model: Any, plan: Any, optimizer: Any, **settings: Any) -> None:
        apply_prune_plan(model, plan, optimizer, **settings)
        model.encoder.layer[-1].output.LayerNorm.bias.data[0] += 1e-6

    model: Any = apt.patch_model(tiny_model("bert").bert)  # type: ignore[operator]
    monkeypatch.setattr("apt.surgery.event.apply_prune_plan", careless)
    with pytest.raises(RuntimeError, match=r"the event of step 6 moved a logit by 1\.00e-06"):
        base_run(model, model.forward, 6)
    monkeypatch.undo()
    whole: Any = apt.patch_model(tiny_model("bert"))
    with pytest.warns(UserWarning, match="verify_events saw no pass of the whole model before the event of step 6"):
        base_run(whole, whole.bert, 6)
    assert apt.unpatch_model(whole) is whole
    assert around_of(whole) is None


CUTS = {  # every kind of plan, in two runs
    "units and ranks that grow": {},
    "units and ranks that go": {
        "method": "adalora",
        "prune": True,
        "tinit": 2,
        "deltaT": 3,
        "target_r": 2,
        "tfinal": 8,
    },
}


@pytest.mark.parametrize("settings", CUTS.values(), ids=CUTS)
def test_a_run_and_its_replay_carry_out_plans_by_the_same_functions(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[Plan] = []

    def listened(act: Act) -> Act:
        def carry_out(model: Any, plan: Plan, *rest: Any) -> None:
            done.append(plan)
            act(model, plan, *rest)

        return carry_out

    for kind, act in ACTS.items():
        monkeypatch.setitem(ACTS, kind, listened(act))
    loop = Loop("bert", patched("bert", **settings), 30, target_sparsity=0.5, **BRIEF).take(30)
    live = done.copy()
    done.clear()
    replayed = patched("bert", **settings)
    for event in loop.run.events:
        apply_event(replayed, Event.from_json(event.to_json()))
    assert done == live == [plan for event in loop.run.events for plan in event.plans]
    shapes = {name: tensor.shape for name, tensor in loop.model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in replayed.state_dict().items()} == shapes


RUNS = {  # with none of the phases but growth, with each of the others
    "lora": ({"method": "lora"}, {}),
    "adalora": ({"method": "adalora"}, {"tfinal": 8, "tinit": 2}),
    "apt": ({}, BRIEF),
    "teacher": ({}, {"use_self_distillation": True, **BRIEF}),
}


@pytest.mark.parametrize(("built", "settings"), RUNS.values(), ids=RUNS)
def test_a_state_has_the_same_keys_whatever_the_run_does(built: dict[str, Any], settings: dict[str, Any]) -> None:
    model = patched("bert", **built, **(settings if built.get("method") == "adalora" else {}))
    loop = Loop("bert", model, 30, **settings).take(1)
    tables = {"importance", "salience", "masks", "teacher"}
    numbers = {"step", "events", "past", "built", "start_params", "rank_budget", "latency", "distillation"}
    assert loop.run.state_dict().keys() == tables | numbers


def test_a_second_run_goes_on_where_the_first_ended() -> None:
    first = Loop("bert", patched("bert"), 30, target_sparsity=0.5, **BRIEF).take(20)
    second = Loop("bert", first.model, 30, target_sparsity=0.8, **BRIEF).take(20)
    reached = [event.sparsity for event in second.run.events]
    assert 0.5 <= reached[0] <= reached[1] < 0.8 <= reached[2] < 0.85


def test_masks_fall_evenly_and_rest_at_zero_or_one() -> None:
    loop = Loop("bert", patched("bert"), 40, target_sparsity=0.5, **ONCE).take(10)
    run = loop.run
    run.pruning.salience.update = lambda new: None  # scores that hold still
    last = masks_of(run)
    assert (last == 1).all()
    for step in range(11, 20):
        loop.take(1)
        masks = masks_of(run)
        assert (masks <= last).all()
        if step < 15:
            wanted = torch.tensor(1.0 - 0.2 * (step - 10))
            assert ((masks == 1) | (masks - wanted).abs().lt(1e-6)).all()
            assert (masks < 1).any()
        else:
            assert ((masks == 0) | (masks == 1)).all()
            assert torch.equal(masks, last) or step == 15
        last = masks
    kept = {group.name: group.mask.values.nonzero().flatten().tolist() for group in run.groups}
    loop.take(1)
    assert run.events[0].prune is not None
    assert run.events[0].prune.kept == kept


def test_masks_that_follow_moving_scores_stay_within_bounds() -> None:
    loop = Loop("llama", patched("llama"), 40, target_sparsity=0.5, **ONCE).take(10)
    last = masks_of(loop.run)
    for _ in range(4):
        masks = masks_of(loop.take(1).run)
        assert ((masks >= 0) & (masks <= 1)).all()
        assert ((masks - last).abs() < 0.2 + 1e-6).all()
        last = masks


def test_gates_close_after_the_last_event() -> None:
    loop = Loop("bert", patched("bert"), 30, target_sparsity=0.5, **BRIEF).take(17)
    gates = [group.mask for group in loop.run.groups]
    assert all(gate.collecting for gate in gates)
    loop.take(3)
    assert not loop.run.active
    gates = [group.mask for group in loop.run.groups]
    assert gates
    assert not any(gate.collecting or gate.masked or gate.count or gate.sums.any() for gate in gates)
    apt_kernels.reset_calls()
    loop.take(1)
    assert "gate" not in apt_kernels.calls()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank": 4}, "controller: the model was patched with rank=3, got 4; patch it anew"),
        ({"scale": 1.0}, "patched with scale=2.0, got 1.0"),
        ({"method": "lora"}, "patched with method='apt', got 'lora'"),
        ({"target_modules": ["q"]}, r"patched with target_modules=None, got \('q',\)"),
        ({"target_sparcity": 0.5}, "unknown setting 'target_sparcity'; did you mean target_sparsity"),
        ({"pruning": 0.5}, "unknown setting 'pruning'; did you mean"),
        ({"target_sparsity": 1.0}, r"target_sparsity must be in \[0, 1\), got 1.0"),
        ({"target_sparsity": -0.2}, r"target_sparsity must be in \[0, 1\), got -0.2"),
        ({"target_sparsity": 0.9, "min_heads": 3}, "target_sparsity 0.9 is not reachable; with min_heads=3"),
        ({"prune_end": 1000}, "a run of 100 steps is too short for 5 events between step 2 and step 1000"),
        ({"num_events": 60}, "a run of 100 steps is too short for 60 events"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], words: str) -> None:
    model = patched("bert")
    with pytest.raises(ValueError, match=words) as caught:
        Loop("bert", model, 100, **settings)
    assert "\n" not in str(caught.value)
    assert not any(module.unit_mask.collecting for _, module in adapted(model) if module.unit_mask is not None)


def test_a_run_too_short_and_a_plain_model() -> None:
    with pytest.raises(ValueError, match="a run of 5 steps is too short for 5 events"):
        Loop("bert", patched("bert"), 5)
    with pytest.raises(ValueError, match=r"not patched; call apt\.patch_model"):
        Loop("bert", tiny_model("bert"), 100)


@pytest.mark.parametrize("form", ["output", "mapping", "tensor"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_a_loss_that_is_no_number_stops_the_run(value: float, form: str) -> None:
    loop = Loop("bert", patched("bert"), 30, target_sparsity=0.5, **BRIEF).take(3)
    before = copy.deepcopy(loop.model)
    output = loop.model(**tiny_batch("bert"))
    assert loop.run.loss(output) is output.loss
    output["loss"] = torch.full((), value)
    given = {"output": output, "mapping": dict(output), "tensor": output.loss}[form]
    with pytest.raises(FloatingPointError, match=f"the loss is {value} at step 4; the parameters .* step 3"):
        loop.run.loss(given)
    assert equal_bits(loop.model, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_a_gradient_that_is_no_number_stops_the_run(value: float) -> None:
    loop = Loop("bert", patched("bert"), 30, target_sparsity=0.5, **BRIEF).take(3)
    before = copy.deepcopy(loop.model)
    with pytest.raises(FloatingPointError, match=r"a gradient is NaN or infinite at step 4; the parameters .* step 3"):
        loop.take(1, poison=value)
    assert equal_bits(loop.model, before)


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "loss scaling"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_a_score_that_is_no_number_stops_the_run_with_its_group(value: float, scaled: bool) -> None:
    """As of an activation that overflowed in padding, which reaches neither loss nor gradient."""
    scaler = {"scaler": Scaler(), "loss_scale": 1024.0} if scaled else {}
    loop = Loop("bert", patched("bert"), 30, target_sparsity=0.5, **scaler, **BRIEF).take(3)
    before, scores = copy.deepcopy(loop.model), copy.deepcopy(loop.run.pruning.salience.values)
    group = loop.run.groups[3]
    group.mask.sums[0, 2] = value
    with pytest.raises(FloatingPointError, match=f"the salience of {group.name} is NaN or infinite at step 4"):
        loop.take(1)
    assert equal_bits(loop.model, before)
    assert all(torch.equal(loop.run.pruning.salience.values[name], scores[name]) for name in scores)


class Scaler:
    """What the controller asks a gradient scaler."""

    def get_scale(self) -> float:
        return 1024.0


def test_a_scaler_changes_no_score() -> None:
    start = fill_adapters(patched("bert"))
    plain = Loop("bert", copy.deepcopy(start), 40, target_sparsity=0.5, **ONCE).take(3)
    scaled = Loop("bert", copy.deepcopy(start), 40, 1024.0, scaler=Scaler(), target_sparsity=0.5, **ONCE).take(3)
    for ours, theirs in (
        (scaled.run.pruning.salience, plain.run.pruning.salience),
        (scaled.run.importance, plain.run.importance),
    ):
        assert ours.values.keys() == theirs.values.keys()
        assert all(value.sum() > 0 for value in theirs.values.values())
        for name, value in theirs.values.items():
            close(name, ours.values[name], value)


def test_a_step_that_overflowed_leaves_no_trace() -> None:
    loop = Loop("bert", patched("bert"), 40, 1024.0, scaler=Scaler(), target_sparsity=0.5, **ONCE).take(2)
    before = {name: value.clone() for name, value in loop.run.pruning.salience.values.items()}
    loop.take(1, poison=float("inf"))
    assert all(torch.equal(loop.run.pruning.salience.values[name], before[name]) for name in before)
    assert not any(group.mask.sums.any() for group in loop.run.groups)
    loop.take(17)
    assert loop.run.events[0].sparsity >= 0.5


@pytest.mark.parametrize("overflows", [12, 16, 22], ids=["into the decay", "past its end", "past the event"])
def test_a_run_that_overflows_at_first_still_prunes(overflows: int) -> None:
    loop = Loop("bert", patched("bert"), 40, 1024.0, scaler=Scaler(), target_sparsity=0.5, **ONCE)
    loop.take(overflows, poison=float("inf")).take(26 - overflows)
    assert [event.step for event in loop.run.events] == [20]
    assert 0.5 <= loop.run.events[0].sparsity <= apt.summary(loop.model).sparsity


def test_checking_an_event_leaves_each_module_its_own_mode() -> None:
    loop = Loop("bert", patched("bert", dropout=0.1), 30, target_sparsity=0.4, verify_events=True, **BRIEF)
    loop.model.bert.embeddings.eval()  # as where a part is kept from dropping out
    loop.take(30)
    assert sum(event.prune is not None for event in loop.run.events) == 3
    assert not loop.model.bert.embeddings.dropout.training
    assert loop.model.bert.encoder.training
