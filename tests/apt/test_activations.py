"""A gated block is one op where a kernel runs: the same numbers and statistics, and the mask applied once."""

import copy
from typing import Any

import pytest
import torch
from check import close
from tiny_models import fill_adapters, tiny_batch, tiny_model
from torch import Tensor, nn
from transformers.activations import ACT2FN

import apt
import apt_kernels
from apt.layers.gated_activation import GatedActivation, kind_of
from apt.layers.unit_mask import UnitMask
from apt_kernels import selection

GATED = ["llama_bias", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"]


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine whose table names a kernel for this op; it computes by eager, since kernels know no float64."""
    true = selection._registered
    monkeypatch.setattr(selection, "_registered", lambda op, *rest: op == "gated_activation" or true(op, *rest))
    monkeypatch.setattr(apt_kernels, "chosen", lambda op, *_: "triton")
    apt_kernels.reset_calls()


def patched(name: str, **options: Any) -> nn.Module:
    return fill_adapters(apt.patch_model(tiny_model(name), rank=2, **options))


def down_gates(model: nn.Module) -> list[UnitMask]:
    return [module.down.unit_mask for module in model.modules() if isinstance(module, GatedActivation)]


def without(model: nn.Module) -> nn.Module:
    """A copy with the blocks' own activations."""
    plain = copy.deepcopy(model)
    for name, module in list(plain.named_modules()):
        if isinstance(module, GatedActivation):
            parent, _, leaf = name.rpartition(".")
            setattr(plain.get_submodule(parent), leaf, module.act)
    return plain


def step(model: nn.Module, name: str) -> dict[str, Tensor]:
    model.zero_grad()
    out = model(**tiny_batch(name))
    out.loss.backward()
    found = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    for key, module in model.named_modules():
        if isinstance(module, UnitMask):
            found |= {f"{key} {kind}": getattr(module, kind) for kind in ("sums", "total", "count")}
    return {"logits": out.logits.detach(), **found}


@pytest.mark.parametrize("statistics", [(), ("collecting",), ("collecting", "products"), ("collecting", "totals")])
@pytest.mark.parametrize("masked", [False, True], ids=["open", "masks on their way"])
@pytest.mark.parametrize("name", GATED)
def test_equals_the_blocks_own_way(name: str, masked: bool, statistics: tuple[str, ...], registered: None) -> None:
    model = patched(name, target_modules=["q", "v", "gate", "up", "down"])
    assert len(down_gates(model)) == model.config.num_hidden_layers
    for module in model.modules():
        if isinstance(module, UnitMask):
            module.collecting, module.products, module.totals = (
                kind in statistics for kind in ("collecting", "products", "totals")
            )
            if masked:
                module.set_mask(torch.randint(0, 3, (module.num_units,)).to(module.values.dtype) / 2)
    plain = without(model)
    got = step(model, name)
    assert apt_kernels.calls()["gated_activation"]["torch"] > 0
    apt_kernels.reset_calls()
    wanted = step(plain, name)
    assert "gated_activation" not in apt_kernels.calls()
    assert got.keys() == wanted.keys()
    for key, value in wanted.items():
        close(key, got[key], value)


def test_the_triton_kernel_runs_inside_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 through the kernels themselves, masks and statistics on."""
    model = patched("llama_gqa", target_modules=["gate", "down"]).float()
    for gate in down_gates(model):
        gate.collecting = True
        gate.set_mask(torch.rand(gate.num_units))
    plain = without(model)
    monkeypatch.setenv("APT_BACKEND", "triton")
    apt_kernels.reset_calls()
    got = step(model, "llama_gqa")
    layers = model.config.num_hidden_layers
    assert apt_kernels.calls()["gated_activation"] == {"triton": 2 * layers}
    assert "gate" not in apt_kernels.calls()
    monkeypatch.setenv("APT_BACKEND", "torch")
    wanted = step(plain, "llama_gqa")
    for key, value in wanted.items():
        close(key, got[key], value)


def test_eager_keeps_the_blocks_own_activation() -> None:
    model = patched("llama_gqa")
    apt_kernels.reset_calls()
    step(model, "llama_gqa")
    assert "gated_activation" not in apt_kernels.calls()


def test_recomputed_layers_change_nothing(registered: None) -> None:
    model = patched("llama_gqa", target_modules=["gate", "down"])
    for gate in down_gates(model):
        gate.set_mask(torch.randint(0, 3, (gate.num_units,)).to(gate.values.dtype) / 2)
    wanted = step(model, "llama_gqa")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for key, value in step(model.train(), "llama_gqa").items():
        close(key, value, wanted[key])


def test_without_a_gate_there_is_no_mask(registered: None) -> None:
    """As the dense teacher runs."""
    model = patched("llama_gqa")
    for gate in down_gates(model):
        gate.set_mask(torch.zeros(gate.num_units))
    masked = step(model, "llama_gqa")["logits"]
    for module in model.modules():
        if isinstance(module, GatedActivation):
            module.down.unit_mask = None
    dense = step(model, "llama_gqa")["logits"]
    close("logits", dense, step(without(model), "llama_gqa")["logits"])
    assert (dense - masked).abs().max() > 0.1


def test_another_tensor_behind_the_gate_is_refused(registered: None) -> None:
    model = patched("llama_gqa")
    for gate in down_gates(model):
        gate.set_mask(torch.rand(gate.num_units))
    model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda module, args: (args[0] * 1,))
    with pytest.raises(RuntimeError, match="the mask was applied to another tensor"):
        model(**tiny_batch("llama_gqa"))


def test_unpatching_puts_the_activation_back() -> None:
    model = patched("phi3")
    assert any(isinstance(module, GatedActivation) for module in model.modules())
    apt.unpatch_model(model)
    assert type(model.model.layers[0].mlp.activation_fn) is type(tiny_model("phi3").model.layers[0].mlp.activation_fn)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("silu", "silu"),
        ("gelu", "gelu"),
        ("gelu_python", "gelu"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("gelu_new", "gelu_tanh"),
        ("gelu_fast", "gelu_tanh"),
        ("quick_gelu", None),
        ("relu", None),
    ],
)
def test_kinds_of_transformers(name: str, kind: str | None) -> None:
    assert kind_of(ACT2FN[name]) == kind
