"""LoRA in PEFT's words, beside PEFT's own LoRA with the same weights: logits and gradients."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import fill_adapters, tiny_batch, tiny_model
from torch import nn

import apt
from apt.layers import adapted
from apt.methods import default_targets

WORDS: dict[str, dict[str, Any]] = {
    "alpha": {"r": 4, "lora_alpha": 12, "target_modules": ["query", "value"]},
    "rslora": {"r": 4, "lora_alpha": 12, "use_rslora": True, "target_modules": ["query", "value"]},
    "expression": {"r": 4, "lora_alpha": 12, "target_modules": r".*\.layer\.[12]\..*\.(query|dense)"},
    "all": {"r": 4, "lora_alpha": 12, "target_modules": "all-linear"},
    "patterns": {
        "r": 4,
        "lora_alpha": 12,
        "target_modules": ["query", "value"],
        "rank_pattern": {"value": 2, "layer.1.attention.self.query": 6},
        "alpha_pattern": {r"layer.[02].*": 3},
    },
}


FOR_LLAMA = {
    "alpha": {"target_modules": ["q_proj", "v_proj"]},
    "rslora": {"target_modules": ["q_proj", "v_proj"]},
    "expression": {"target_modules": r".*\.layers\.[12]\..*\.(q_proj|down_proj)"},
    "all": {},
    "patterns": {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"v_proj": 2, "layers.1.self_attn.q_proj": 6},
        "alpha_pattern": {r"layers.[02].*": 3},
    },
}


@pytest.mark.parametrize("case", WORDS)
@pytest.mark.parametrize("kind", ["bert_mlm", "llama_gqa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_and_gradients_are_those_of_peft(dtype: torch.dtype, kind: str, case: str) -> None:
    words = {**WORDS[case], **(FOR_LLAMA[case] if kind == "llama_gqa" else {})}
    allowed = {torch.float32: 1e-6, torch.float64: 1e-13}[dtype]
    model = fill_adapters(apt.patch_model(tiny_model(kind, dtype), method="lora", **words))
    theirs = get_peft_model(tiny_model(kind, dtype), LoraConfig(**words)).eval()
    layers = {n.removeprefix("base_model.model."): m for n, m in theirs.named_modules() if hasattr(m, "lora_A")}
    modules = {name: module for name, module in adapted(model) if module.rank}
    assert modules.keys() == layers.keys()
    with torch.no_grad():
        for name, module in modules.items():
            assert module.scale == pytest.approx(layers[name].scaling["default"])
            layers[name].lora_A["default"].weight.copy_(module.lora_A)
            layers[name].lora_B["default"].weight.copy_(module.lora_B)
    ours, wanted = (m(**tiny_batch(kind)) for m in (model, theirs))
    assert (ours.logits - wanted.logits).abs().max() <= allowed * max(1.0, float(wanted.logits.abs().max()))
    ours.loss.backward()
    wanted.loss.backward()
    for name, module in modules.items():
        for side in ("lora_A", "lora_B"):
            mine, other = getattr(module, side).grad, getattr(layers[name], side)["default"].weight.grad
            assert other.abs().max() > 0
            assert (mine - other).abs().max() <= 10 * allowed * max(1.0, float(other.abs().max()))


def test_targets_of_a_model_without_a_table() -> None:
    assert default_targets("phi", ["a.q_proj", "a.v_proj", "m.fc1", "m.fc2"]) == ("q_proj", "v_proj", "fc1", "fc2")
    assert default_targets("unheard-of", ["h.0.attn.qkv_proj", "h.0.mlp.up"]) == ("qkv_proj",)
    assert default_targets(None, ["linear1", "linear2"]) == "all-linear"
    model = apt.patch_model(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)), method="lora", r=2)
    assert [module.rank for _, module in adapted(model)] == [2, 2]


def test_words_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="r and rank are one setting"):
        apt.patch_model(tiny_model("bert"), method="lora", r=2, rank=2)
    with pytest.raises(ValueError, match="no regular expression"):
        apt.patch_model(tiny_model("bert"), method="lora", target_modules="que(ry")
    with pytest.raises(ValueError, match="matches no linear layer"):
        apt.patch_model(tiny_model("bert"), method="lora", target_modules="query")
    with pytest.raises(ValueError, match="use_rslora needs lora_alpha"):
        apt.patch_model(tiny_model("bert"), method="lora", use_rslora=True)
