"""Liger's kernels beside ours, in Triton's interpreter: norms, rotary embedding, SwiGLU and the loss are Liger's."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter
from check import close
from liger_kernel.ops import cross_entropy, geglu, rms_norm
from liger_kernel.transformers import LigerRMSNorm, _apply_liger_kernel_to_instance
from tiny_models import fill_adapters, random_plan, tiny_batch, tiny_model
from torch import Tensor, nn
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.llama import modeling_llama
from triton.runtime.interpreter import TensorHandle

import apt
from apt.distillation.losses import predictions_of
from apt.layers.hidden import HiddenNorm, hand_on_kernels
from apt.layers.unit_mask import UnitMask
from apt.surgery.prune import apply_prune_plan


@pytest.fixture(autouse=True)
def as_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Liger's kernels ask of the compiler and the interpreter lacks: float arguments as scalars, and libdevice."""
    if torch.cuda.is_available():
        return
    convert = interpreter._implicit_cvt

    def converted(argument: Any) -> Any:
        if isinstance(argument, float):
            return tl.tensor(TensorHandle(np.array([argument], dtype=np.float32), tl.float32), tl.float32)
        return convert(argument)

    monkeypatch.setattr(interpreter, "_implicit_cvt", converted)
    for module in (rms_norm, geglu, cross_entropy):
        monkeypatch.setattr(module, "rsqrt", lambda x: 1.0 / tl.sqrt(x), raising=False)
        monkeypatch.setattr(module, "tanh", lambda z: 2.0 * tl.sigmoid(2.0 * z) - 1.0, raising=False)


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Liger puts its classes into the modules of transformers too; later tests get back what was there."""
    for module in (modeling_llama, modeling_gemma2):
        for name, value in list(vars(module).items()):
            monkeypatch.setattr(module, name, value)


def with_liger(model: nn.Module, **options: Any) -> nn.Module:
    """As `TrainingArguments(use_liger_kernel=True)` does it, on this one model."""
    _apply_liger_kernel_to_instance(model=model, rope=False, **options)  # rope is patched for all models at once
    return model


def patched(model: nn.Module) -> nn.Module:
    """With masks on their way and gates that collect."""
    torch.manual_seed(0)
    fill_adapters(apt.patch_model(model, rank=2, target_modules=["q", "v", "gate", "up", "down"]))
    for module in model.modules():
        if isinstance(module, UnitMask):
            module.collecting = True
            module.set_mask(torch.randint(0, 3, (module.num_units,)) / 2)
    return model.train()


def batch(model: nn.Module, name: str) -> dict[str, Tensor]:
    return {key: tensor.to(model.device) for key, tensor in tiny_batch(name).items()}


def step(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Loss, gradients and statistics."""
    out = model(**batch(model, name))
    out.loss.backward()
    found = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    for key, module in model.named_modules():
        if isinstance(module, UnitMask):
            found |= {f"{key} {kind}": getattr(module, kind) for kind in ("sums", "count")}
    return {"loss": out.loss.detach(), **found}


@pytest.mark.parametrize(
    ("name", "order"), [("llama_gqa", "before patch_model"), ("gemma2", "after it, as Trainer does")]
)
def test_a_step_and_the_pruned_model_equal_those_without_liger(name: str, order: str, device: str) -> None:
    model = tiny_model(name).float().to(device)
    plain = patched(copy.deepcopy(model))
    theirs = patched(with_liger(model)) if order.startswith("before") else with_liger(patched(model))
    hand_on_kernels(theirs)
    for norm in [module for module in theirs.modules() if isinstance(module, HiddenNorm)]:
        assert norm.stock.forward.__func__ is LigerRMSNorm.forward
        assert "forward" not in vars(norm)
    wanted, got = step(plain, name), step(theirs, name)
    assert wanted.keys() == got.keys()
    for key, value in wanted.items():
        size = value.abs().max().clamp(min=1.0)
        close(key, got[key] / size, value / size)
    plan = random_plan(plain, seed=1)
    losses = []
    for pruned in (plain, theirs):
        apply_prune_plan(pruned, plan)
        losses.append(pruned(**batch(pruned, name)).loss.detach())
    close("loss of the pruned model", *losses)
    assert (losses[0] - wanted["loss"]).abs() > 1e-3


def test_distillation_without_logits_says_what_to_do(device: str) -> None:
    """Liger's fused loss keeps them to itself."""
    model = with_liger(patched(tiny_model("llama_gqa").float().to(device)))
    output = model(**batch(model, "llama_gqa"))
    with pytest.raises(ValueError, match="fused_linear_cross_entropy=False"):
        predictions_of(output)


def test_a_run_finds_what_trainer_has_bound(device: str) -> None:
    """`Trainer` binds Liger's forward to a model that is patched already; the controller is made after that."""
    model = with_liger(apt.patch_model(tiny_model("llama_gqa").float().to(device), rank=2))
    assert "forward" in vars(model.model.norm)
    apt.Controller(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]), total_steps=40)
    assert "forward" not in vars(model.model.norm)
    assert model.model.norm.stock.forward.__func__ is LigerRMSNorm.forward
