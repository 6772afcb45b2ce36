"""A teacher beside a student that loses hidden dimensions: what it was, in the order of the weights they share."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from check import Unrounded, close
from own_loop import BRIEF, Loop, equal_bits, take_both
from own_loop import patched as in_training
from test_teacher import patched, seen_by, train_a_little
from tiny_models import NAMES, free_heads, has_hidden_table, random_plan, set_masks, tiny_batch
from torch import Tensor

import apt
from apt.distillation import SelfDistiller
from apt.families import anatomy_of
from apt.layers import adapted
from apt.pruning.dimensions import find_dimensions
from apt.surgery.prune import apply_prune_plan
from apt.surgery.tails import free_tails

HIDDEN = [name for name in NAMES if has_hidden_table(name)]
ALL = ("head", "neuron", "hidden")


def same_as(distiller: SelfDistiller, batch: dict[str, Tensor], wanted: tuple[Tensor, list[Tensor]]) -> None:
    order = find_dimensions(anatomy_of(distiller.model)).mask.order
    found = distiller.forward_teacher(batch)
    close("logits", found.predictions["logits"], wanted[0])
    assert found.layers
    for index, hidden in found.layers.items():
        close(f"layer {index}", hidden, wanted[1][index][..., order])


@pytest.mark.parametrize("name", HIDDEN)
def test_the_teacher_stays_what_the_student_was(name: str) -> None:
    """Through updates, masks and two events of all three kinds that empty sub-layers."""
    with Unrounded():
        judge(name)


def judge(name: str) -> None:
    model = patched(name)
    batch, start = tiny_batch(name), copy.deepcopy(model)
    distiller = SelfDistiller(model.train())
    distiller.snapshot()
    wanted = seen_by(start, batch)
    for event, empty in enumerate([free_heads(model)[-1:], free_heads(model)], 1):
        train_a_little(model, name)
        plan = random_plan(model, hidden=True, empty=empty, seed=event)
        set_masks(model, plan)
        same_as(distiller, batch, wanted)
        apply_prune_plan(model, plan, keep_tail=True)
        distiller.follow()
        same_as(distiller, batch, wanted)
    student = copy.deepcopy(model)
    logits = seen_by(student, batch)[0]
    assert (logits - wanted[0]).abs().max() > 1e-2  # otherwise the teacher might be the student
    distiller.drop()
    free_tails(model)
    close("student without its teacher", seen_by(model, batch)[0], logits)
    for _, module in adapted(model):
        assert module.weight.shape == (module.n_out, module.n_in)


@pytest.mark.parametrize("name", ["bert", "llama_gqa"])
def test_tr_leads_from_the_student_to_the_teacher(name: str) -> None:
    """Fresh, it is ``[I; 0]``; trained, its columns follow the student and its rows the teacher, moments with them."""
    model = patched(name).train()
    distiller = SelfDistiller(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    distiller.snapshot()
    tr, batch = distiller.transform, tiny_batch(name)
    train_a_little(model, name)  # else there is nothing to learn from the teacher
    for seed in (1, 2):
        output = model(**batch)
        distiller.compute_distill_loss(output, distiller.forward_teacher(batch), batch).backward()
        optimizer.step()
        assert tr.lora_B.detach().any()
        h = torch.randn(3, tr.lora_A.shape[1], dtype=torch.float64)
        kept = random_plan(model, hidden=True, seed=seed).kept["hidden"]
        shut = torch.zeros_like(h)
        shut[:, kept] = h[:, kept]
        before = tr(shut)
        moments = [optimizer.state[p]["exp_avg_sq"].clone() for p in (tr.lora_A, tr.lora_B)]
        old = find_dimensions(anatomy_of(model)).mask.order
        plan = random_plan(model, hidden=True, seed=seed)
        apply_prune_plan(model, plan, optimizer, keep_tail=True)
        distiller.follow()
        order = find_dimensions(anatomy_of(model)).mask.order
        place = [old.tolist().index(index) for index in order.tolist()]
        close("Tr", tr(h[:, kept]).detach(), before.detach()[:, place])
        assert torch.equal(optimizer.state[tr.lora_A]["exp_avg_sq"], moments[0][:, kept])
        assert torch.equal(optimizer.state[tr.lora_B]["exp_avg_sq"], moments[1][place])
    free_tails(model, optimizer)
    live = tr.lora_A.shape[1]
    assert tr.lora_B.shape[0] == optimizer.state[tr.lora_B]["exp_avg"].shape[0] == live < 32
    distiller.snapshot()  # the student as narrow as it is teaches from here on
    output = model(**batch)
    distiller.compute_distill_loss(output, distiller.forward_teacher(batch), batch).backward()
    optimizer.step()


@pytest.mark.parametrize("name", ["bert", "llama_cls", "t5"])
def test_a_run_distils_and_prunes_all_three(name: str) -> None:
    settings = {"target_sparsity": 0.7, "unit_types": ("neuron", "hidden"), "verify_events": True, **BRIEF}
    loop = Loop(name, in_training(name), 40, use_self_distillation=True, distill_end=30, **settings).take(40)
    counts = apt.summary(loop.model)
    assert counts.hidden < 32
    assert counts.params_after == sum(p.numel() for k, p in loop.model.named_parameters() if "lora_" not in k)
    assert not hasattr(loop.model, "apt_transform")


def test_a_distilled_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    """While the teacher runs and dimensions are gone already."""
    settings: dict[str, Any] = {"target_sparsity": 0.7, "unit_types": ("neuron", "hidden"), **BRIEF}
    settings |= {"use_self_distillation": True, "distill_end": 30}
    whole = Loop("llama_cls", in_training("llama_cls", torch.float32), 40, **settings).take(13)
    assert whole.run.groups[-1].num_units < 32
    resumed = whole.resumed(in_training("llama_cls", torch.float32), tmp_path, 40, **settings)
    take_both(whole, resumed, 22)
    assert [event.prune for event in whole.run.events] == [event.prune for event in resumed.run.events]
    assert equal_bits(whole.model, resumed.model)
