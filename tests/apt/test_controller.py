"""A run: what it changes, what it leaves alone bit for bit, when, and what it refuses."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from check import close
from tiny_models import fill_adapters, tiny_batch, tiny_model
from torch import Tensor

import apt
from apt.adapters import adapted
from apt.checkpoint import load_controller, restore_shapes, save_controller
from apt.records import Event, read_jsonl

BRIEF = {"num_events": 3, "round_to": 4, "prune_end": 0.6}
ONCE = {"num_events": 1, "prune_start": 0, "prune_end": 20, "decay": 5, "settle": 5, "round_to": 1}  # falls in 10-15


class Loop:
    """A training loop of one's own around a patched model."""

    def __init__(self, name: str, model: Any, total_steps: int = 30, loss_scale: float = 1.0, **settings: Any) -> None:
        self.name, self.model, self.loss_scale, self.step = name, model, loss_scale, 0
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        self.run: Any = apt.Controller(model, self.optimizer, total_steps, **settings) if total_steps else None

    def take(self, steps: int, poison: float | None = None) -> "Loop":
        """Train so many steps; where `poison` goes into a gradient, the optimizer sits that step out."""
        for _ in range(steps):
            self.step += 1
            batch = tiny_batch(self.name, seed=self.step)
            output = self.model(**batch)
            loss = output.loss if self.run is None else self.run.loss(output, batch)
            (loss * self.loss_scale).backward()
            grads = [p.grad for p in self.model.parameters() if p.grad is not None]
            if poison is not None:
                grads[0].view(-1)[0] = poison
            if self.run is not None:
                self.run.after_backward()
            torch._foreach_div_(grads, self.loss_scale)
            if poison is None:
                self.optimizer.step()
            if self.run is not None:
                self.run.after_step()
            self.optimizer.zero_grad()
        return self


def patched(name: str, dtype: torch.dtype = torch.float64, dropout: float = 0.0, **settings: Any) -> Any:
    dropouts = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout} if dropout else {}
    return apt.patch_model(tiny_model(name, dtype, **dropouts), rank=3, **settings).train()


def equal_bits(ours: Any, theirs: Any) -> bool:
    mine, other = ours.state_dict(), theirs.state_dict()
    return mine.keys() == other.keys() and all(torch.equal(mine[key], other[key]) for key in mine)


def masks_of(run: apt.Controller) -> Tensor:
    return torch.cat([group.gate.mask.clone() for group in run.groups])


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
    unit = max(max(group.cost() for group in run.groups), 4 * 97) / run.total
    for event in run.events:
        assert event.target_sparsity <= event.sparsity <= event.target_sparsity + unit
    assert 0.6 <= counts.sparsity <= 0.6 + unit
    assert counts.sparsity == run.events[-1].sparsity
    assert sum(event.removed for event in run.events) == pytest.approx(counts.sparsity)
    assert all(count % 4 == 0 for count in counts.neurons)
    assert [Event.from_json(row) for row in read_jsonl(tmp_path / "events.jsonl")] == run.events
    listed = {id(p) for group in loop.optimizer.param_groups for p in group["params"]}
    assert listed == {id(p) for p in loop.model.parameters() if p.requires_grad}


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


def test_masks_fall_evenly_and_rest_at_zero_or_one() -> None:
    loop = Loop("bert", patched("bert"), 40, target_sparsity=0.5, **ONCE).take(10)
    run = loop.run
    run.salience.update = lambda new: None  # scores that hold still
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
    kept = {group.name: group.gate.mask.nonzero().flatten().tolist() for group in run.groups}
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
    gates = [group.gate for group in loop.run.groups]
    assert all(gate.collecting for gate in gates)
    loop.take(3)
    assert not loop.run.active
    gates = [group.gate for group in loop.run.groups]
    assert gates
    assert not any(gate.collecting or gate.masked or gate.count or gate.sums.any() for gate in gates)


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
    assert not any(module.gate_in.collecting for _, module in adapted(model) if module.gate_in is not None)


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


class Scaler:
    """What the controller asks a gradient scaler."""

    def get_scale(self) -> float:
        return 1024.0


def test_a_scaler_changes_no_score() -> None:
    start = fill_adapters(patched("bert"))
    plain = Loop("bert", copy.deepcopy(start), 40, target_sparsity=0.5, **ONCE).take(3)
    scaled = Loop("bert", copy.deepcopy(start), 40, 1024.0, scaler=Scaler(), target_sparsity=0.5, **ONCE).take(3)
    for ours, theirs in ((scaled.run.salience, plain.run.salience), (scaled.run.importance, plain.run.importance)):
        assert ours.values.keys() == theirs.values.keys()
        assert all(value.sum() > 0 for value in theirs.values.values())
        for name, value in theirs.values.items():
            close(name, ours.values[name], value)


def test_a_step_that_overflowed_leaves_no_trace() -> None:
    loop = Loop("bert", patched("bert"), 40, 1024.0, scaler=Scaler(), target_sparsity=0.5, **ONCE).take(2)
    before = {name: value.clone() for name, value in loop.run.salience.values.items()}
    loop.take(1, poison=float("inf"))
    assert all(torch.equal(loop.run.salience.values[name], before[name]) for name in before)
    assert not any(group.gate.sums.any() for group in loop.run.groups)
    loop.take(17)
    assert loop.run.events[0].sparsity >= 0.5


@pytest.mark.parametrize("overflows", [12, 16, 22], ids=["into the decay", "past its end", "past the event"])
def test_a_run_that_overflows_at_first_still_prunes(overflows: int) -> None:
    loop = Loop("bert", patched("bert"), 40, 1024.0, scaler=Scaler(), target_sparsity=0.5, **ONCE)
    loop.take(overflows, poison=float("inf")).take(26 - overflows)
    assert [event.step for event in loop.run.events] == [20]
    assert 0.5 <= loop.run.events[0].sparsity <= apt.summary(loop.model).sparsity


def test_state_dict_round_trip_in_the_middle_of_a_decay(tmp_path: Path) -> None:
    """Through files, onto a model patched anew: both go on alike, bit for bit."""
    settings = {"target_sparsity": 0.6, "num_events": 3, "prune_end": 24, "round_to": 4}
    first = Loop("bert", patched("bert"), 30, **settings).take(12)
    assert len(first.run.events) == 1
    assert apt.summary(first.model).masked > 0
    save_controller(first.run, tmp_path)

    model = patched("bert")
    restore_shapes(model, tmp_path)
    model.load_state_dict(first.model.state_dict())
    second = Loop("bert", model, 30, **settings)
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    load_controller(second.run, tmp_path)
    second.step = first.step
    ours, theirs = second.run.state_dict(), first.run.state_dict()
    assert all(ours[key] == theirs[key] for key in ("step", "events", "start_params"))
    for table in ("salience", "importance", "masks"):
        assert ours[table].keys() == theirs[table].keys()
        assert all(torch.equal(ours[table][name], theirs[table][name]) for name in theirs[table])
    for loop in (first, second):
        torch.manual_seed(5)
        loop.take(18)
    assert len(first.run.events) == 3
    assert equal_bits(second.model, first.model)


def test_a_folder_without_a_state(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"checkpoint: .* holds no apt_state.json; it was not written by APTrainer"):
        restore_shapes(patched("bert"), tmp_path)


def test_two_runs_side_by_side_do_not_meet() -> None:
    settings = {"target_sparsity": 0.6, "adaptive_rank_update": False, **BRIEF}
    starts = {name: patched(name) for name in ("bert", "llama_gqa")}
    alone = {name: Loop(name, copy.deepcopy(start), 30, **settings).take(20) for name, start in starts.items()}
    together = {name: Loop(name, copy.deepcopy(start), 30, **settings) for name, start in starts.items()}
    for _ in range(20):
        for loop in together.values():
            loop.take(1)
    for name in starts:
        assert equal_bits(together[name].model, alone[name].model)
        assert len(together[name].run.events) == 3


def test_a_copy_of_a_patched_model_trains_on_its_own() -> None:
    model = patched("bert")
    kept = copy.deepcopy(model.state_dict())
    twin = Loop("bert", copy.deepcopy(model), 30, target_sparsity=0.6, **BRIEF).take(20)
    assert apt.summary(twin.model).sparsity >= 0.6
    assert apt.summary(model).sparsity == 0.0
    assert all(torch.equal(tensor, kept[key]) for key, tensor in model.state_dict().items())
    assert model._apt.valid.mask is None  # the copy's batches went to the copy's gates
