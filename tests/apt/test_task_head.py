"""The head that trains in full: in float32 on a narrow model, and out again in the dtype it came in."""

from pathlib import Path
from typing import Any

import pytest
import torch
from check import SLACK
from own_loop import BRIEF, Loop, equal_bits
from safetensors.torch import load_file
from tiny_models import CLASSIFIERS, tiny_batch, tiny_model
from torch import Tensor

import apt
from apt.surgery.task_head import task_head

NARROW = (torch.bfloat16, torch.float16)


def head_of(model: Any) -> dict[str, Tensor]:
    inside = {id(p) for module in task_head(model) for p in module.parameters()}
    return {name: p for name, p in model.named_parameters() if id(p) in inside}


@pytest.mark.parametrize("method", ["apt", "lora"])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_narrow_model_has_a_wide_head_and_comes_back_as_it_was(name: str, dtype: torch.dtype, method: str) -> None:
    model, stock = tiny_model(name, dtype), tiny_model(name, dtype)
    apt.patch_model(model, method=method)
    assert head_of(model)
    for key, parameter in model.named_parameters():
        wanted = torch.float32 if parameter.requires_grad else dtype
        assert parameter.dtype == wanted, key
    batch = tiny_batch(name)
    with torch.no_grad():
        ours, theirs = model(**batch).logits, stock(**batch).logits
    assert ours.dtype == torch.float32
    apart = (ours - theirs.float()).abs() / theirs.float().abs().clamp(min=1.0)
    assert apart.max() <= 4 * SLACK[dtype]
    model(**batch).loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in head_of(model).values())
    apt.unpatch_model(model)
    assert equal_bits(model, stock)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert not any(module._forward_pre_hooks for module in model.modules())
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, theirs)


def test_small_steps_arrive() -> None:
    """At this learning rate a step is below what bfloat16 can add to all but the smallest of these weights."""
    model = apt.patch_model(tiny_model("bert", torch.bfloat16)).train()
    before = {name: p.detach().clone() for name, p in head_of(model).items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6, weight_decay=0.0)
    for step in range(3):
        optimizer.zero_grad()
        model(**tiny_batch("bert", seed=step)).loss.backward()
        optimizer.step()
    for name, p in head_of(model).items():
        assert (p != before[name]).float().mean() > 0.5, name
        assert (p.to(torch.bfloat16) != before[name].to(torch.bfloat16)).float().mean() < 0.1, name
        assert optimizer.state[p]["exp_avg_sq"].dtype == torch.float32


@pytest.mark.parametrize("name", ["bert", "gpt2_cls"])
def test_a_run_in_bfloat16_exports_bfloat16(name: str, tmp_path: Path) -> None:
    model = apt.patch_model(tiny_model(name, torch.bfloat16), rank=3).train()
    Loop(name, model, 30, target_sparsity=0.5, **BRIEF).take(30)
    apt.export_model(model.eval(), tmp_path / "export")
    stored = load_file(tmp_path / "export/model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    loaded = apt.load_model(tmp_path / "export")
    with torch.no_grad():
        ours, theirs = model(**tiny_batch(name)).logits, loaded(**tiny_batch(name)).logits
    apart = (ours - theirs.float()).abs() / ours.abs().clamp(min=1.0)
    assert apart.max() <= 4 * SLACK[torch.bfloat16]


def test_a_wide_model_is_left_alone() -> None:
    for dtype in (torch.float32, torch.float64):
        model = apt.patch_model(tiny_model("bert", dtype))
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert not any(module._forward_pre_hooks for module in task_head(model))
