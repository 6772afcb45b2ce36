"""When a run has a teacher, what its loss is then, what an event leaves for it, and how it is saved and goes."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from check import close
from own_loop import BRIEF, Loop, equal_bits, patched, take_both
from tiny_models import tiny_batch, tiny_model

import apt
from apt.distillation import DistillationConfig, SelfDistiller
from apt.layers import adapted
from apt.pruning.schedule import loss_weight
from apt.training.batches import hold_out
from apt.training.controller.distillation import Stage

# Events after steps 6, 12 and 18; masks fall from steps 2, 8 and 14 on for 3 steps; the teacher goes after step 24.
TAUGHT = {"use_self_distillation": True, "target_sparsity": 0.6, "distill_end": 24, "transform_rank": 2, **BRIEF}
POINTS = (0, 3, 8, 11, 12, 23, 26)  # steps at which a run is saved


def teacher_logits(loop: Loop, seed: int = 99) -> torch.Tensor:
    found: torch.Tensor = loop.run.distillation.distiller.forward_teacher(tiny_batch(loop.name, seed=seed)).predictions[
        "logits"
    ]
    return found


@pytest.mark.parametrize("name", ["bert", "llama_gqa", "qwen2_mixed", "gpt2", "t5"])
def test_a_distilled_run(name: str) -> None:
    """Taken before the first mask falls, teaching from the first event on, the same at every step, then gone."""
    loop = Loop(name, patched(name), 30, verify_events=True, **TAUGHT).take(1)
    run, distillation = loop.run, loop.run.distillation
    assert distillation.snapshots == []
    loop.take(1)
    assert distillation.snapshots == [2]
    wanted = teacher_logits(loop)
    for step in range(3, 24):
        assert distillation.teaches(run.step) == (run.step >= 6)
        loop.take(1)
        close(f"teacher at step {step}", teacher_logits(loop), wanted)
    assert [event.step for event in run.events] == [6, 12, 18]
    dense = [module.weight.shape for _, module in adapted(loop.model)]
    live = [(module.n_out, module.n_in) for _, module in adapted(loop.model)]
    assert dense != live
    loop.take(1)
    assert distillation.over
    assert [module.weight.shape for _, module in adapted(loop.model)] == live
    assert not hasattr(loop.model, "apt_transform")
    listed = {id(p) for group in loop.optimizer.param_groups for p in group["params"]}
    assert listed == {id(p) for p in loop.model.parameters() if p.requires_grad}
    assert {id(p) for p in loop.optimizer.state} <= listed
    loop.take(6)
    assert apt.summary(loop.model).sparsity >= 0.6


def test_the_loss_is_mu_of_the_teacher_and_the_rest_of_the_task() -> None:
    loop = Loop("bert", patched("bert"), 30, w_pred=0.4, w_layer=0.5, **TAUGHT).take(8)
    run = loop.run
    batch = tiny_batch("bert", seed=50)
    output = loop.model(**batch)
    loss = run.loss(output, batch)
    terms = run.distillation.distiller.terms
    mu = (9 - 0) / (18 - 0)  # the window is 0 to 18
    close("loss", loss.detach(), (mu * (0.4 * terms.prediction + 0.5 * terms.layer) + (1 - mu) * output.loss).detach())
    (seen,) = [run.distillation.report()]
    assert seen.keys() == {"task_loss", "distill_loss", "mu"}
    assert run.distillation.report() == {}


def test_before_and_after_the_loss_is_the_task_s() -> None:
    loop = Loop("bert", patched("bert"), 30, **TAUGHT)
    for steps in (0, 4, 20):
        loop.take(steps)
        output = loop.model(**tiny_batch("bert"))
        assert (loop.run.loss(output, tiny_batch("bert")) is output.loss) == (loop.run.step != 4 or steps == 4)
        assert loop.run.loss(output) is output.loss


@pytest.mark.parametrize(
    ("step", "begins", "ends", "weight"),
    [(5, 10, 20, 0.1), (10, 10, 20, 0.1), (15, 10, 20, 0.5), (20, 10, 20, 0.9), (99, 10, 20, 0.9), (7, 10, 10, 0.9)],
)
def test_the_ramp_of_mu(step: int, begins: int, ends: int, weight: float) -> None:
    assert loss_weight(step, begins, ends, 0.1, 0.9) == pytest.approx(weight)


def test_both_windows_of_the_ramp() -> None:
    settings = {**TAUGHT, "prune_start": 3, "prune_end": 18, "distill_loss_weight_start": 0.2}
    by_window = Loop("bert", patched("bert"), 30, **settings).run.distillation
    assert [by_window.weight(step) for step in (3, 8, 18, 20)] == pytest.approx([0.2, 0.2 + 0.8 / 3, 1.0, 1.0])
    by_events = Loop("bert", patched("bert"), 30, mu_ramp="distill", **settings).run.distillation
    assert by_events.first == 8
    assert [by_events.weight(step) for step in (8, 13, 18)] == pytest.approx([0.2, 0.6, 1.0])


def test_a_warm_up_of_sparsity_moves_the_teacher_to_the_first_event_that_prunes() -> None:
    loop = Loop("bert", patched("bert"), 30, sparsity_warmup=8, **TAUGHT).take(7)
    assert (len(loop.run.events), loop.run.distillation.snapshots, loop.run.distillation.first) == (1, [], 12)
    loop.take(4)
    assert loop.run.distillation.snapshots == [8]
    assert not loop.run.distillation.teaches(loop.run.step)
    loop.take(1)
    assert loop.run.distillation.teaches(loop.run.step)


def test_a_hard_switch_takes_the_teacher_just_before_the_cut() -> None:
    loop = Loop("bert", patched("bert"), 30, decay=0, settle=0, **TAUGHT).take(5)
    assert loop.run.distillation.snapshots == []
    loop.take(1)
    assert loop.run.distillation.snapshots == [6]
    shapes = {module.weight.shape for _, module in adapted(loop.model)}
    assert shapes == {(32, 32), (40, 32), (32, 40)}
    loop.take(1)


def test_at_the_end_of_the_run_it_is_gone_at_the_latest() -> None:
    loop = Loop("bert", patched("bert"), 20, **{**TAUGHT, "distill_end": 500}).take(19)
    assert loop.run.distillation.teaches(loop.run.step)
    loop.take(1)
    assert loop.run.distillation.over
    assert not hasattr(loop.model, "apt_transform")


def test_the_teacher_runs_every_third_step(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    forward = SelfDistiller.forward_teacher
    loop = Loop("bert", patched("bert"), 30, distill_every=3, **TAUGHT)

    def counted(self: Any, batch: Any) -> Any:
        steps.append(loop.run.step)
        return forward(self, batch)

    monkeypatch.setattr(SelfDistiller, "forward_teacher", counted)
    loop.take(30)
    assert steps == [6, 9, 12, 15, 18, 21]


def test_layers_are_drawn_from_a_generator_of_its_own() -> None:
    """One layer of each block, new ones after every distilled step; another seed draws others."""
    drawn = []
    for seed in (3, 3, 4):
        model = deep()
        torch.manual_seed(seed)
        loop, rows = Loop("bert", model, 30, num_teacher_layers=2, **TAUGHT), []
        for _ in range(24):
            rows.append(tuple(loop.run.distillation.distiller.sampled))
            loop.take(1)
        drawn.append(rows)
    assert drawn[0] == drawn[1] != drawn[2]
    assert set(drawn[0][:7]) == {drawn[0][0]}
    assert len(set(drawn[0][6:])) > 4


@pytest.mark.parametrize("name", ["bert", "llama_gqa"])
def test_a_teacher_without_weight_changes_nothing(name: str) -> None:
    """Dropout, plans, new ranks and weights are those of a run that has none: its pass and its tails leave no trace."""
    runs = []
    for settings in ({"target_sparsity": 0.6, **BRIEF}, {**TAUGHT, "distill_loss_weight_end": 0.0}):
        torch.manual_seed(3)
        runs.append(Loop(name, patched(name, dropout=0.1 if name == "bert" else 0.0), 30, **settings).take(30))
    plain, taught = (loop.run.events for loop in runs)
    assert [(event.prune, event.rank) for event in taught] == [(event.prune, event.rank) for event in plain]
    theirs, ours = (loop.model.state_dict() for loop in runs)
    assert ours.keys() == theirs.keys()
    for key, wanted in theirs.items():
        close(key, ours[key], wanted)


def deep(layers: int = 6) -> Any:
    return apt.patch_model(tiny_model("bert", num_hidden_layers=layers), rank=3).train()


@pytest.mark.parametrize(("name", "at"), [*((n, at) for n in ("bert", "llama_gqa") for at in POINTS), ("t5", 11)])
def test_a_run_resumes_bit_for_bit(name: str, at: int, tmp_path: Path) -> None:
    """Before there is a teacher, in the first decay, in a decay while it teaches, at an event, and after it is gone."""
    settings = {**TAUGHT, "num_teacher_layers": 2}
    dropout = 0.1 if name == "bert" else 0.0
    first = Loop(name, patched(name, torch.float32, dropout), 30, **settings).take(at)
    model = patched(name, torch.float32, dropout)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)  # what is not restored is seen
    second = first.resumed(model, tmp_path / "checkpoint", **settings)
    assert second.run.distillation.distiller.sampled == first.run.distillation.distiller.sampled or at == 26
    for loop in (first, second):
        torch.manual_seed(5)
        loop.take(30 - at)
    assert second.run.distillation.snapshots == first.run.distillation.snapshots
    assert len(first.run.events) == 3
    assert equal_bits(second.model, first.model)
    ours, theirs = second.optimizer.state_dict()["state"], first.optimizer.state_dict()["state"]
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[i][key], theirs[i][key]) for i in theirs for key in theirs[i])


def test_what_is_saved_after_a_failed_step_is_as_before_it() -> None:
    loop = Loop("bert", deep(), 30, num_teacher_layers=2, **TAUGHT).take(8)
    before = loop.run.state_dict()["teacher"]
    batch = tiny_batch("bert", seed=50)
    loop.run.loss(loop.model(**batch), batch)
    after = loop.run.state_dict()["teacher"]
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


class Scores:
    """A held-out score that says what it is told, and remembers whom it was asked about."""

    def __init__(self, *scores: float) -> None:
        self.scores, self.asked = list(scores), []

    def __call__(self, model: Any) -> float:
        assert not model.training
        self.asked.append(model(**tiny_batch("bert", seed=99)).logits.detach().clone())
        torch.rand(3)
        return self.scores.pop(0)


def test_only_a_better_student_takes_the_place_of_its_teacher() -> None:
    held_out = Scores(0.5, 0.6, 0.4)
    loop = Loop("bert", patched("bert"), 30, held_out=held_out, teacher_refresh=True, **TAUGHT).take(2)
    distillation = loop.run.distillation
    close("first", teacher_logits(loop), held_out.asked[0])
    loop.take(6)
    assert (len(held_out.asked), len(distillation.snapshots)) == (2, 1)
    close("worse", teacher_logits(loop), held_out.asked[0])
    loop.take(6)
    assert (len(held_out.asked), len(distillation.snapshots)) == (3, 2)
    close("better", teacher_logits(loop), held_out.asked[2])
    assert (held_out.asked[2] - held_out.asked[0]).abs().max() > 1e-3
    loop.take(4)
    close("kept", teacher_logits(loop), held_out.asked[2])
    assert distillation.since_event == 2
    loop.take(12)


def test_asking_leaves_the_run_as_it_was() -> None:
    """A refresh that never happens changes no bit, dropout and all."""
    models = []
    for settings in ({}, {"teacher_refresh": True, "held_out": Scores(0.5, 0.6, 0.7)}):
        torch.manual_seed(3)
        models.append(Loop("bert", patched("bert", dropout=0.1), 30, **TAUGHT, **settings).take(30).model)
    assert equal_bits(*models)


def test_held_out_batches_are_scored_by_their_mean_loss() -> None:
    batches = [tiny_batch("bert", size=4, seed=1), tiny_batch("bert", size=2, seed=2)]
    model = patched("bert")
    loop = Loop("bert", model, 30, held_out=batches, teacher_refresh=True, **TAUGHT).take(1)
    twin = copy.deepcopy(model).eval()
    losses = [twin(**batch).loss.item() for batch in batches]
    loop.take(1)
    assert loop.run.distillation.teacher_score == pytest.approx((4 * losses[0] + 2 * losses[1]) / 6, rel=0.2)
    assert model.training


def test_a_refreshed_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    settings = {**TAUGHT, "teacher_refresh": True}
    first = Loop("bert", patched("bert"), 30, held_out=Scores(0.5, 0.4, 0.3), **settings).take(11)
    assert first.run.distillation.since_event == 1
    second = first.resumed(patched("bert"), tmp_path, held_out=Scores(0.3), **settings)
    take_both(first, second, 19)
    assert first.run.distillation.snapshots == second.run.distillation.snapshots != []
    assert equal_bits(second.model, first.model)


def test_a_share_of_the_training_data_is_held_out() -> None:
    rest, held = hold_out([f"row {i}" for i in range(100)], 0.1, seed=1)
    assert (len(rest), len(held)) == (90, 10)
    assert {rest[i] for i in range(90)} | {held[i] for i in range(10)} == {f"row {i}" for i in range(100)}
    again = hold_out(list(range(100)), 0.1, seed=1)[1]
    other = hold_out(list(range(100)), 0.1, seed=2)[1]
    assert [f"row {i}" for i in again] == list(held)
    assert list(again) != list(other)
    assert len(hold_out(list(range(5)), 0.02, seed=1)[1]) == 1
    with pytest.raises(ValueError, match="holds out part of train_dataset, which must have a length above 1"):
        hold_out(iter(range(5)), 0.1, seed=1)


def test_the_optimizer_keeps_its_groups_and_its_schedule() -> None:
    model = patched("bert")
    adapters = [p for n, p in model.named_parameters() if p.requires_grad and "lora_" in n]
    head = [p for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n]
    optimizer = torch.optim.AdamW([{"params": head, "lr": 1e-3}, {"params": adapters, "lr": 3e-3}])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
    run = apt.Controller(model, optimizer, 30, **TAUGHT)
    assert [len(group["params"]) for group in optimizer.param_groups] == [len(head), len(adapters) + 2]
    transform = list(model.apt_transform.parameters())
    assert optimizer.param_groups[1]["params"][-2:] == transform
    apt.Controller(model, optimizer, 30, **TAUGHT)  # a second one does not put it in again
    assert [len(group["params"]) for group in optimizer.param_groups] == [len(head), len(adapters) + 2]
    run = apt.Controller(model, optimizer, 30, **TAUGHT)
    moved = transform[1].detach().clone()
    for step in range(30):
        batch = tiny_batch("bert", seed=step)
        run.loss(model(**batch), batch).backward()
        assert step >= 24 or (transform[1].grad is not None) == (step >= 6)
        run.after_backward()
        optimizer.step()
        schedule.step()
        run.after_step()
        optimizer.zero_grad()
    assert not torch.equal(transform[1], moved)
    assert len(optimizer.param_groups[0]["params"]) == len(head)
    assert schedule.get_last_lr() == pytest.approx([1e-3 / 31, 3e-3 / 31])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_events": 0, "target_sparsity": 0.0}, "this run has none; set use_self_distillation to false"),
        ({"target_sparsity": 0.0}, "this run has none; set use_self_distillation to false"),
        ({"distill_end": 6}, "distill_end is step 6, but the first event that prunes comes after step 6"),
        ({"teacher_refresh": True}, "give the controller held_out=, batches or a function of the model"),
        ({"prune_before_tuning": True}, "this run has none; set use_self_distillation to false"),
    ],
)
def test_a_distillation_that_cannot_be(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Loop("bert", patched("bert"), 30, **{**TAUGHT, **settings})


def test_lora_has_no_teacher_and_a_loss_needs_batch_and_predictions() -> None:
    with pytest.raises(ValueError, match="this run has none; set use_self_distillation to false"):
        Loop("bert", patched("bert", method="lora"), 30, use_self_distillation=True)
    loop = Loop("bert", patched("bert"), 30, **TAUGHT).take(6)
    output = loop.model(**tiny_batch("bert"))
    with pytest.raises(ValueError, match=r"the teacher needs the batch; call run\.loss\(output, batch\)"):
        loop.run.loss(output)
    with pytest.raises(ValueError, match="needs the predictions of the student, got Tensor"):
        loop.run.loss(output.loss, tiny_batch("bert"))


def test_settings_reach_the_distiller_by_the_seeds_names() -> None:
    settings = {"teacher_layer_mapping": "cofi", "num_teacher_layers": 2, "distill_loss_weight_start": 0.1}
    loop = Loop("bert", patched("bert"), 30, **TAUGHT, **settings)
    found = loop.run.distillation.distiller.config
    assert isinstance(found, DistillationConfig)
    assert (found.teacher_layer_mapping, found.num_teacher_layers, found.distill_loss_weight_start) == ("cofi", 2, 0.1)


def test_a_compiled_student_is_distilled_as_a_plain_one() -> None:
    """Compiled first; what it catches changes with every batch and compiles nothing anew."""
    losses: list[list[float]] = []
    for compiled in (True, False):
        torch.manual_seed(3)
        loop = Loop("bert", deep(2), 0)
        student = torch.compile(loop.model, backend="eager") if compiled else loop.model
        run = apt.Controller(loop.model, loop.optimizer, 30, num_teacher_layers=1, **TAUGHT)
        torch._dynamo.utils.counters.clear()
        losses.append([])
        for step in range(9):
            batch = tiny_batch("bert", seed=step)
            loss = run.loss(student(**batch), batch)
            losses[-1].append(loss.item())
            loss.backward()
            run.after_backward()
            loop.optimizer.step()
            run.after_step()
            loop.optimizer.zero_grad()
        assert run.distillation is not None
        assert run.distillation.stage is Stage.TEACHING
        if compiled:
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 1
            assert not torch._dynamo.utils.counters["recompile_limit"]
    assert losses[0] == losses[1]
