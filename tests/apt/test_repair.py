"""Repair of a cut: the closed form against least squares, and what it leaves of a model beside the model itself."""

import copy
import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from check import close
from own_loop import Loop, equal_bits, patched
from tiny_models import NAMES, fill_adapters, free_heads, random_plan, set_masks, tiny_batch, tiny_model
from tiny_run import write_config
from torch import Tensor

import apt
from apt.apt_config import APTConfig
from apt.families import anatomy_of
from apt.layers import adapted
from apt.pruning import UnitScores, UnitSearch
from apt.pruning.units import block_params, find_units
from apt.repair.moments import collecting, hold_out
from apt.repair.repairer import Repairer
from apt.repair.solve import Moment, solve
from apt.runs.report.tables import repaired_sheet, repairs_sheet
from apt.surgery.prune import apply_prune_plan
from apt.training.controller.calibrated_cut import CalibratedCut
from apt.training.controller.calibration import model_loss

EVERYWHERE = ("q", "k", "v", "o", "up", "down")
REPAIR: dict[str, Any] = {"repair": "weights", "kurtosis": "off", "round_to": 1, "moment_batches": 4}


def moment_of(x_TD: Tensor) -> Moment:
    moment = Moment.zeros(x_TD.shape[1], x_TD.device, x_TD.dtype)
    moment.add(x_TD)
    return moment


def batches(name: str, count: int = 4) -> list[dict[str, Tensor]]:
    return [tiny_batch(name, seed=seed) for seed in range(count)]


def calibration(name: str) -> apt.Calibration:
    return apt.Calibration(lambda step: [tiny_batch(name, seed=1000 + step + number) for number in range(4)])


def repaired(model: Any, name: str, kept: dict[str, list[int]], *, keep_dense: bool = False) -> dict[str, Any]:
    """Repair what the plan's units are read by, from a few batches."""
    groups = find_units(anatomy_of(model))
    with collecting([group.reader for group in groups]) as collectors, torch.no_grad():
        for number, batch in enumerate(batches(name, 9)):
            hold_out(collectors, number, 9)
            model.eval()(**batch)
    found = {group.name: collector for group, collector in zip(groups, collectors, strict=True)}
    return Repairer(groups, keep_dense=keep_dense).repair(kept, found)


def searched(model: Any) -> tuple[UnitScores, UnitSearch]:
    """The units of a patched model and the search over them, by its own settings."""
    config = apt.surgery.patch_state(model).config.pruning
    return UnitScores(anatomy_of(model), config), UnitSearch(block_params(anatomy_of(model)), config)


@torch.no_grad()
def logits(model: Any, name: str, seed: int = 77) -> Tensor:
    found: Tensor = model.eval()(**tiny_batch(name, seed=seed)).logits
    return found


@pytest.mark.parametrize("with_bias", [False, True])
def test_it_is_the_ridge_regression_towards_the_kept_weights(with_bias: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(200, 12, generator=draw, dtype=torch.float64) @ torch.randn(12, 12, generator=draw).double() + 0.5
    weight = torch.randn(5, 12, generator=draw, dtype=torch.float64)
    kept = torch.tensor([0, 1, 4, 5, 8, 10])
    gone = torch.tensor([2, 3, 6, 7, 9, 11])
    found = solve(weight, moment_of(x[:150]), moment_of(x[150:]), kept, with_bias=with_bias)
    assert found.ridge is not None
    # Least squares on rows: the tokens, centred where there is a bias, and one row for each entry that is drawn to 0.
    rows = x - x.mean(0) if with_bias else x
    r = found.ridge * rows[:, kept].square().mean(0).mean() * len(rows)
    stacked = torch.cat([rows[:, kept], r.sqrt() * torch.eye(6, dtype=torch.float64)])
    wanted = torch.cat([rows[:, gone] @ weight[:, gone].T, torch.zeros(6, 5, dtype=torch.float64)])
    close("weight", found.weight, torch.linalg.lstsq(stacked, wanted).solution.T)
    if with_bias:
        assert found.bias is not None
        left = x[:, gone] @ weight[:, gone].T - x[:, kept] @ found.weight.T
        close("bias", found.bias, left.mean(0))
    else:
        assert found.bias is None


def test_the_errors_are_those_on_the_tokens_held_out() -> None:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(300, 8, generator=draw, dtype=torch.float64) @ torch.randn(8, 8, generator=draw).double()
    weight = torch.randn(3, 8, generator=draw, dtype=torch.float64)
    kept = torch.arange(5)
    found = solve(weight, moment_of(x[:200]), moment_of(x[200:]), kept, with_bias=False)
    y = x[200:] @ weight.T
    before = (y - x[200:, :5] @ weight[:, :5].T).square().sum() / y.square().sum()
    assert found.before == pytest.approx(float(before))
    assert found.after < found.before


def test_a_repair_that_helps_nothing_is_none() -> None:
    """Inputs that know nothing of each other, on few tokens: what was fitted is noise, as the tokens held out say."""
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(14, 12, generator=draw, dtype=torch.float64)
    weight = torch.randn(4, 12, generator=draw, dtype=torch.float64)
    unrelated = torch.randn(400, 12, generator=draw, dtype=torch.float64)
    found = solve(weight, moment_of(x), moment_of(unrelated), torch.arange(10), with_bias=False)
    assert found.ridge is None
    assert found.before == found.after
    assert not found.weight.any()


@pytest.mark.parametrize("tokens", [1, 3])
def test_fewer_tokens_than_inputs_repair_no_worse_than_not(tokens: int) -> None:
    x = torch.randn(tokens, 12, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    found = solve(torch.ones(4, 12).double(), moment_of(x), None, torch.arange(6), with_bias=True)
    assert found.after <= found.before
    assert found.weight.isfinite().all()


def test_inputs_that_are_all_zero_leave_the_weights() -> None:
    found = solve(torch.ones(4, 6).double(), moment_of(torch.zeros(9, 6)), None, torch.arange(3), with_bias=False)
    assert not found.weight.any()
    assert found.before == found.after == 0.0


def test_a_batch_with_a_number_that_is_none_is_told_by_the_units_that_read_it() -> None:
    model = patched("llama_gqa")
    kept = {group.name: list(range(group.num_units - 1)) for group in find_units(anatomy_of(model))}
    model.model.embed_tokens.weight.data[3] = float("nan")
    with pytest.raises(FloatingPointError, match=r"repair: of layers\.0\.heads the inputs hold a number that is NaN"):
        repaired(model, "llama_gqa", kept)


@pytest.mark.parametrize("name", NAMES)
def test_masked_and_repaired_is_shrunk_and_repaired(name: str) -> None:
    model = fill_adapters(apt.patch_model(tiny_model(name), rank=2, target_modules=EVERYWHERE))
    plan = random_plan(model, empty=free_heads(model)[:1], seed=4)
    dense = logits(model, name)
    set_masks(model, plan)
    cut = logits(model, name)
    for group in find_units(anatomy_of(model)):
        group.mask.set_mask(torch.ones(group.num_units))
    notes = repaired(model, name, plan.kept)
    set_masks(model, plan)
    masked = logits(model, name)
    apply_prune_plan(model, plan)
    close("logits", logits(model, name), masked)
    assert not torch.equal(masked, cut)
    assert any(note.ridge is not None for note in notes.values())
    assert all(note.after <= note.before for note in notes.values())
    assert (masked - dense).square().sum() < 1.5 * (cut - dense).square().sum()


@pytest.mark.parametrize("name", ["bert", "llama_gqa", "gpt2", "phi3", "t5"])
def test_duplicate_neurons_are_cut_exactly(name: str) -> None:
    """Half of the neurons are doubles of the other half: what the doubles gave, their twins can give."""
    model = apt.patch_model(tiny_model(name), rank=1, target_modules=["q"])
    kept = {}
    for part in anatomy_of(model).parts:
        if part.name.endswith("neurons"):
            half = part.num_units // 2
            for role, linear in part.linears.items():
                if role != part.table.reader:
                    for tensor in (linear.weight, linear.bias):
                        if tensor is not None:
                            tensor.data[half : 2 * half] = tensor.data[:half]
            kept[part.name] = [*range(half), *range(2 * half, part.num_units)]
    dense = logits(model, name)
    notes = repaired(model, name, kept)
    assert {note.ridge for note in notes.values()} <= {1e-6}
    apply_prune_plan(model, apt.records.PrunePlan(step=0, target_sparsity=None, kept=kept, round_to=1))
    assert float((logits(model, name) - dense).abs().max()) < 1e-5


def test_where_nothing_goes_no_bit_moves() -> None:
    model = patched("bert")
    before = copy.deepcopy(model)
    assert (
        repaired(model, "bert", {group.name: list(range(group.num_units)) for group in find_units(anatomy_of(model))})
        == {}
    )
    assert equal_bits(model, before)


def test_padding_is_left_out_of_the_moments() -> None:
    """Of a decoder behind an encoder too, whose tokens its labels tell."""
    for name in ("llama_gqa", "t5", "opt"):
        model = patched(name)
        reader = find_units(anatomy_of(model))[-1].reader
        seen: list[Tensor] = []
        hook = reader.register_forward_pre_hook(lambda _, args, into=seen: into.append(args[0].detach()))
        batch = tiny_batch(name)
        with collecting([reader]) as (collector,):
            model.eval()(**batch)
        hook.remove()
        valid = batch["labels"] != -100 if name == "t5" else batch["attention_mask"].bool()
        x = seen[0].reshape(-1, reader.n_in)[valid.flatten()]
        assert 0 < len(x) < valid.numel()
        close(name, collector.fit.second, x.T @ x)
        close(name, collector.fit.total, x.sum(0))
        assert float(collector.fit.count) == len(x)


@pytest.mark.parametrize(("count", "held"), [(1, []), (2, [1]), (5, [4]), (8, [7]), (20, [7, 15])])
def test_every_eighth_batch_is_held_out_or_the_last(count: int, held: list[int]) -> None:
    (name, group), *_ = ((group.name, group) for group in find_units(anatomy_of(patched("bert"))))
    with collecting([group.reader]) as (collector,):
        parts = []
        for number in range(count):
            hold_out([collector], number, count)
            parts.append(collector.part)
    assert [number for number, part in enumerate(parts) if part] == held, name


@pytest.mark.parametrize("rounds", [1, 3])
def test_a_calibrated_cut_is_no_other_without_gradients(rounds: int) -> None:
    """One round scores once; more of them shut units that stay shut, and the last repair is from the dense weights."""
    model = patched("llama_gqa", target_sparsity=0.5, salience="fisher", **REPAIR)
    dense = copy.deepcopy(model)
    units, search = searched(model)
    plans = []

    def choose(scores: dict[str, Tensor], part: float) -> Any:
        plans.append(search.plan(units.groups, scores, search.total, 0, 0.5 * part))
        return plans[-1]

    state = torch.get_rng_state()
    plan = CalibratedCut(model, units, batches("llama_gqa", 9), model_loss, 2).carry_out(choose, rounds)
    assert torch.equal(state, torch.get_rng_state())
    assert len(plans) == rounds
    for earlier, later in itertools.pairwise(plans):
        assert all(set(later.kept[name]) <= set(earlier.kept[name]) for name in later.kept)
    assert all(parameter.grad is None for parameter in model.parameters())
    repaired(dense, "llama_gqa", plan.kept)
    for (name, ours), (_, theirs) in zip(adapted(model), adapted(dense), strict=True):
        close(name, ours.weight, theirs.weight)


@pytest.mark.parametrize("settings", [{}, {"use_self_distillation": True}], ids=["alone", "with a teacher"])
def test_a_run_that_repairs_is_resumed_to_the_same_bits(settings: dict[str, Any], tmp_path: Path) -> None:
    model = {"target_sparsity": 0.5, "num_events": 3, "prune_end": 0.6, "salience": "fisher", **REPAIR, **settings}

    def begun() -> Loop:
        torch.manual_seed(5)
        return Loop("llama_gqa", patched("llama_gqa", **model), calibration=calibration("llama_gqa"))

    whole = begun().take(30)
    assert [event.prune is not None for event in whole.run.events] == [True] * 3
    assert all(event.prune.repair for event in whole.run.events)
    for at in (5, 13, 21):
        with torch.random.fork_rng():
            fresh = patched("llama_gqa", **model)
        other = begun().take(at).resumed(fresh, tmp_path / str(at), calibration=calibration("llama_gqa"))
        other.take(30 - at)
        assert equal_bits(other.model, whole.model)
        assert [event.prune for event in other.run.events] == [event.prune for event in whole.run.events]


def test_a_teacher_keeps_the_weights_from_before_a_repair() -> None:
    name = "bert"
    model = fill_adapters(apt.patch_model(tiny_model(name), rank=3, target_modules=EVERYWHERE))
    distiller = apt.SelfDistiller(model)
    wanted = logits(model, name)
    distiller.snapshot()
    for seed in (1, 2):
        plan = random_plan(model, seed=seed, hidden=False)
        repaired(model, name, plan.kept, keep_dense=True)
        apply_prune_plan(model, plan, keep_tail=True)
        with torch.no_grad():
            taught = distiller.forward_teacher(tiny_batch(name, seed=77)).predictions["logits"]
        close("the teacher's logits", taught, wanted)
    distiller.drop()
    assert all(linear.teacher_weight is None for _, linear in adapted(model))


def test_a_run_that_repairs_asks_for_data() -> None:
    with pytest.raises(ValueError, match=r"controller: events with repair='weights' take calibration data"):
        Loop("bert", patched("bert", target_sparsity=0.5, **REPAIR))
    wrong: Any = batches("bert")
    with pytest.raises(ValueError, match=r"give Controller\(calibration=apt.Calibration\(lambda step: batches\)\)"):
        Loop("bert", patched("bert", target_sparsity=0.5, **REPAIR), calibration=wrong)
    with pytest.raises(ValueError, match=r"calibration: batches is a function of an event's step, got a list"):
        apt.Calibration(wrong)
    with pytest.raises(ValueError, match=r"calibration: batches are mappings .* got a tuple"):
        model_loss(patched("bert"), tuple(wrong[0].values()))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"pruning: rounds are of events that repair"):
        APTConfig().with_overrides(rounds=2)


def test_dry_run_and_estimate_tell_what_it_costs(tmp_path: Path) -> None:
    from apt.runs.config import load_config
    from apt.runs.estimate.dry_run import dry_run
    from apt.runs.estimate.estimate import estimate

    path = write_config(tmp_path)
    plain = load_config(path, ["train_size=192"])
    asked = load_config(path, ["train_size=192", "repair=weights", "rounds=2", "calibration_batches=3", "num_events=1"])
    assert "repair" not in str(dry_run(plain))
    assert "repair       at each event; 2 x 3 batches forward and backward to choose, 64 forward" in str(dry_run(asked))
    without, found = (estimate(config, baseline=False) for config in (plain, asked))
    step, event = found.phases["before pruning"], found.phases["an event that repairs"]
    # Both moments of the inputs of two attentions (32) and two FFNs (64), and their weights, in float32.
    assert event.peak - step.peak == 4 * (2 * 2 * (32**2 + 64**2) + 2 * (32 * 32 + 32 * 64))
    assert "masks fall" not in found.phases
    assert found.run_over_lora > without.run_over_lora


def test_the_report_tells_the_error_of_every_projection() -> None:
    note = apt.records.RepairNote(ridge=1e-2, before=0.25, after=0.125)
    plan = apt.records.PrunePlan(
        step=3, target_sparsity=0.5, kept={"layers.0.heads": [0]}, round_to=1, repair={"layers.0.heads": note}
    )
    event = apt.records.Event(
        step=3,
        prune=plan,
        rank=None,
        target_sparsity=0.5,
        sparsity=0.5,
        removed=0.5,
        block_params=1,
        trainable_params=1,
        seconds=0.1,
    )
    assert apt.records.Event.from_json(json.loads(json.dumps(event.to_json()))) == event
    assert repaired_sheet([event])[0].rows == [("3", "layers.0.heads", "0.2500", "0.1250", "1e-02", "-")]
    assert repairs_sheet([event])[0].rows == [("3", "1", "0.2500", "0.1250")]
    assert repairs_sheet([dataclasses.replace(event, prune=None)]) == []
    corrected = apt.records.RepairNote(ridge=None, before=0.0, after=0.0, stream=0.875)
    more = dataclasses.replace(plan, repair={"layers.0.heads": note, "layers.1.heads": corrected})
    event = dataclasses.replace(event, prune=more)
    assert apt.records.Event.from_json(json.loads(json.dumps(event.to_json()))) == event
    assert repaired_sheet([event])[0].rows[1] == ("3", "layers.1.heads", "0.0000", "0.0000", "-", "87.5%")
    assert repairs_sheet([event])[0].rows == [("3", "1", "0.2500", "0.1250")]  # the other lost nothing itself


def test_a_scaled_loss_scores_alike_and_counts_every_token_once() -> None:
    """With a scaler a batch may pass twice, so the moments are collected apart from the scores."""
    found = []
    for scale in (1.0, 1024.0):
        model = patched("bert", target_sparsity=0.5, salience="fisher", **REPAIR)
        units, search = searched(model)
        cut = CalibratedCut(model, units, batches("bert", 9), model_loss, 3, scale)
        plan = cut.carry_out(lambda scores, part, u=units, s=search: s.plan(u.groups, scores, s.total, 0, 0.5))
        found.append((plan, [linear.weight.clone() for _, linear in adapted(model)]))
    assert found[0][0].kept == found[1][0].kept
    for ours, theirs in zip(found[0][1], found[1][1], strict=True):
        close("weight", ours, theirs)


def test_a_pruner_of_ones_own_says_that_it_does_not_repair() -> None:
    model = patched("bert")
    scheduler = apt.SparsityScheduler(100, 0.5)
    with pytest.raises(ValueError, match=r"pruner: a Controller repairs, at its events"):
        apt.AdaptivePruner(model, scheduler, config=apt.pruning.PruningConfig(repair="weights"))


class BrokenOffError(Exception):
    """What a user's loss may raise."""


@pytest.mark.parametrize("error", [BrokenOffError, KeyboardInterrupt, FloatingPointError])
def test_an_event_that_fails_leaves_the_model_as_it_was(error: type[BaseException]) -> None:
    """Masks open, weights, modes and what asks for gradients; then the same event can be done."""
    settings = {"target_sparsity": 0.5, "num_events": 1, "salience": "fisher", **REPAIR, "rounds": 3}
    settings |= {"calibration_batches": 2, "use_self_distillation": True}
    calls: list[int] = []

    def loss(model: Any, batch: Any) -> Tensor:
        calls.append(len(calls))
        if len(calls) == 7:  # 4 for scores and moments, 2 for those of the second round
            raise error("of the third")
        return model_loss(model, batch)

    given = apt.Calibration(calibration("bert").batches, loss)
    loop = Loop("bert", patched("bert", **settings), calibration=given)
    at = loop.run.progress.next_event
    loop.take(at - 1)
    asked = [parameter.requires_grad for parameter in loop.model.parameters()]
    with pytest.raises(error):
        loop.take(1)
    assert loop.run.events == []
    readers = {id(group.reader) for group in find_units(anatomy_of(loop.model))}
    plain = patched("bert", **settings)
    for (_, linear), (_, dense) in zip(adapted(loop.model), adapted(plain), strict=True):
        assert torch.equal(linear.weight, dense.weight)
        assert id(linear) not in readers or not linear._forward_pre_hooks
    for group in find_units(anatomy_of(loop.model)):
        assert not group.mask.masked
        assert not group.mask.collecting
    assert all(module.training for module in loop.model.modules())
    assert asked == [parameter.requires_grad for parameter in loop.model.parameters()]
    loop.optimizer.zero_grad()
    loop.take(1)
    assert len(loop.run.events) == 1
    assert loop.run.events[0].sparsity >= 0.5


def test_static_scores_that_fail_leave_no_mask_collecting() -> None:
    model = patched("bert", target_sparsity=0.5, prune_before_tuning=True)
    loop = Loop("bert", model)

    def loss(model: Any, batch: Any) -> Tensor:
        raise BrokenOffError

    with pytest.raises(BrokenOffError):
        loop.run.prune_before_tuning(batches("bert"), loss)
    assert not any(group.mask.collecting for group in find_units(anatomy_of(model)))


def test_each_round_sees_the_outliers_of_the_weights_that_it_repaired() -> None:
    """The kurtosis of a neuron's column is kept from step to step, and changes with the repair."""
    model = patched("llama_gqa", target_sparsity=0.5, **{**REPAIR, "salience": "fisher", "kurtosis": "paper"})
    units, search = searched(model)
    shares = []

    def choose(scores: dict[str, Tensor], part: float) -> Any:
        again, _ = searched(model)
        wanted = [again.outliers._term(group) for group in units.groups if group.mask.unit_size == 1]
        units.collect(True)
        found = [units.outliers._term(group) for group in units.groups if group.mask.unit_size == 1]
        shares.append(all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True)))
        return search.plan(units.groups, scores, search.total, 0, 0.5 * part)

    CalibratedCut(model, units, batches("llama_gqa", 9), model_loss, 2).carry_out(choose, 3)
    assert shares == [True] * 3
