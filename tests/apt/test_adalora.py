"""AdaLoRA beside PEFT's on one run: the same logits, importance, masks and final ranks. Then what PEFT leaves out."""

from pathlib import Path
from typing import Any

import pytest
import torch
from check import Unrounded, close
from own_loop import BRIEF, Loop, equal_bits, take_both
from peft import AdaLoraConfig, get_peft_model
from tiny_models import tiny_batch, tiny_model
from torch import Tensor

import apt
from apt.layers import adapted
from apt.records import Event, TrimPlan
from apt.surgery.ranks import apply_trim_plan

STEPS = 12
SCHEDULE = {"tinit": 2, "deltaT": 3, "target_r": 2}


def ours(rank: int = 6, **settings: Any) -> Any:
    settings = {"target_modules": ("q", "v"), **SCHEDULE, **settings}
    return apt.patch_model(tiny_model("bert"), method="adalora", init_r=rank, **settings).train()


def logits(model: Any) -> Tensor:
    with torch.no_grad(), Unrounded():
        return model(**tiny_batch("bert")).logits  # type: ignore[no-any-return]


def deltas(model: Any) -> dict[str, Any]:
    return {name: module.delta for name, module in adapted(model) if module.rank}


def test_a_run_is_that_of_peft() -> None:
    settings = AdaLoraConfig(
        target_modules=["query", "value"], init_r=6, lora_alpha=12, total_step=STEPS, orth_reg_weight=0.5, **SCHEDULE
    )
    theirs = get_peft_model(tiny_model("bert"), settings).train()
    model = ours(scale=12 / (6 + 1e-5), orth_reg_weight=0.5)  # PEFT divides by that
    for parameter in (*model.classifier.parameters(), *model.bert.pooler.parameters()):
        parameter.requires_grad_(False)
    layers = {name.removeprefix("base_model.model."): module for name, module in theirs.named_modules()}
    with torch.no_grad():
        for name, delta in deltas(model).items():
            delta.lora_A.copy_(layers[name].lora_A["default"])
            delta.lora_B.copy_(layers[name].lora_B["default"])
    close("start", logits(model), logits(tiny_model("bert")))
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_("lora_" in name)  # PEFT leaves a count, `ranknum`, to the optimizer too
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2) for m in (model, theirs)]
    run = apt.Controller(model, optimizers[0], STEPS)
    masked = 0
    for step in range(1, STEPS + 1):
        batch = tiny_batch("bert", seed=step)
        with Unrounded():  # PeftModel itself leaves the penalty out
            loss, their_loss = run.loss(model(**batch), batch), theirs.base_model(**batch).loss
        close(f"loss {step}", loss.detach(), their_loss.detach())
        loss.backward()
        their_loss.backward()
        run.after_backward()
        for optimizer in optimizers:
            optimizer.step()
        mine = deltas(model)
        run.after_step()
        theirs.base_model.update_and_allocate(step)
        if step < STEPS:
            table = theirs.base_model.rankallocator
            for name, delta in mine.items():
                for side in "ABE":
                    key = f"{name}.lora_{side}.default"
                    wanted = table._element_score(key).reshape(getattr(delta, f"lora_{side}").shape)
                    product = getattr(delta, f"sensitivity_{side}") * getattr(delta, f"uncertainty_{side}")
                    assert (product - wanted).abs().max() <= 1e-9 * wanted.abs().max()
                assert torch.equal(delta.lora_E == 0, (layers[name].lora_E["default"] == 0).flatten())
                masked += int((delta.lora_E == 0).sum())
        for optimizer in optimizers:
            optimizer.zero_grad()
        close(f"logits {step}", logits(model), logits(theirs))
    assert masked > 0
    pattern = theirs.peft_config["default"].rank_pattern
    final = {key.removesuffix(".lora_E.default"): value for key, value in pattern.items()}
    (event,) = run.events
    assert event.trim is not None
    assert event.trim.kept == {name: [i for i, kept in enumerate(flags) if kept] for name, flags in final.items()}
    assert sum(apt.summary(model).ranks.values()) == sum(map(sum, final.values())) == 2 * 6
    assert Event.from_json(event.to_json()) == event


def test_removed_ranks_go_with_their_moments() -> None:
    loop = Loop("bert", ours(tfinal=5), STEPS + 8, verify_events=True).take(14)
    before = {name: delta.rank for name, delta in deltas(loop.model).items()}
    assert set(before.values()) == {6}
    moments = {
        name: loop.optimizer.state[delta.lora_B]["exp_avg"].clone() for name, delta in deltas(loop.model).items()
    }
    loop.take(1)
    (event,) = loop.run.events
    assert event.trim is not None
    assert event.step == 15
    for name, delta in deltas(loop.model).items():
        state = loop.optimizer.state[delta.lora_B]
        assert delta.rank == len(event.trim.kept[name]) < 6
        assert delta.lora_B.shape == state["exp_avg"].shape == state["exp_avg_sq"].shape
        assert delta.sensitivity_A is None
    survivors = [name for name, kept in event.trim.kept.items() if kept]
    assert survivors
    assert moments[survivors[0]].shape[1] == 6
    assert apt.summary(loop.model).trainable_params == sum(
        p.numel() for g in loop.optimizer.param_groups for p in g["params"]
    )
    loop.take(5)
    assert len(loop.run.events) == 1


def test_an_adapter_that_keeps_no_rank_is_gone() -> None:
    loop = Loop("bert", ours(), 0).take(1)
    names = list(deltas(loop.model))
    gone = deltas(loop.model)[names[0]].lora_A
    with torch.no_grad():
        deltas(loop.model)[names[0]].lora_E.zero_()
        deltas(loop.model)[names[1]].lora_E[3] = 0.0
    before = logits(loop.model)
    plan = TrimPlan(step=1, kept={names[0]: [], names[1]: [0, 1, 2, 4, 5]})
    apply_trim_plan(loop.model, plan, loop.optimizer)
    close("logits", logits(loop.model), before)
    assert names[0] not in deltas(loop.model)
    assert deltas(loop.model)[names[1]].rank == 5
    assert all(p is not gone for group in loop.optimizer.param_groups for p in group["params"])
    with pytest.raises(ValueError, match="kept ranks of"):
        apply_trim_plan(loop.model, TrimPlan(step=2, kept={names[1]: [0, 5]}))


@pytest.mark.parametrize("prune", [False, True])
@pytest.mark.parametrize("pause", [9, 24])
def test_a_resumed_run_is_the_same(pause: int, prune: bool, tmp_path: Path) -> None:
    settings = {"target_sparsity": 0.4, **BRIEF} if prune else {}

    whole = Loop("bert", ours(prune=prune, tfinal=8), verify_events=True, **settings).take(pause)
    resumed = whole.resumed(ours(prune=prune, tfinal=8), tmp_path, verify_events=True, **settings)
    take_both(whole, resumed, 30 - pause)
    assert equal_bits(resumed.model, whole.model)
    assert sum(event.trim is not None for event in resumed.run.events) == 1
    assert len(resumed.run.events) == (4 if prune else 1)
    assert max(apt.summary(resumed.model).ranks.values()) <= 6


def test_a_run_resumes_whose_ranks_went_before_its_teacher_was_replaced(tmp_path: Path) -> None:
    """The tails that a replay leaves are those of the events since the teacher, the one that trimmed ranks counted."""
    built = {"prune": True, "tfinal": 25}  # ranks go after step 5, units after 6, 12 and 18
    taught = {"use_self_distillation": True, "teacher_refresh": True, "distill_end": 28, "target_sparsity": 0.6}
    scores = [0.5, 0.4, 0.3]  # each student is better than its teacher
    whole = Loop("bert", ours(**built), held_out=lambda _: scores.pop(0), **taught, **BRIEF).take(16)
    assert [event.trim is not None for event in whole.run.events] == [True, False, False]
    assert whole.run.distillation.snapshots == [2, 8, 14]
    resumed = whole.resumed(ours(**built), tmp_path, held_out=lambda _: 1.0, **taught, **BRIEF)
    take_both(whole, resumed, 14)
    assert equal_bits(resumed.model, whole.model)


def test_a_schedule_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="leave no step of 10"):
        Loop("bert", ours(tinit=4, tfinal=6), 10)
    with pytest.raises(ValueError, match="target_r 9 is above the rank 6"):
        Loop("bert", ours(target_r=9), 10)
