"""``method="full"``, what the others are measured against: the model as it is, in the same loop, files and reports."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from own_loop import Loop, equal_bits, take_both
from tiny_models import tiny_batch, tiny_model

import apt
from apt.runs.config import load_config


def full(name: str, dtype: torch.dtype = torch.float64) -> Any:
    return apt.patch_model(tiny_model(name, dtype), method="full").train()


@pytest.mark.parametrize("name", ["bert", "llama_gqa", "t5"])
def test_it_trains_as_the_plain_model_does(name: str) -> None:
    plain = tiny_model(name, torch.float64).train()
    ours = Loop(name, full(name), 5)
    theirs = Loop(name, plain, 0, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3))
    take_both(ours, theirs, 5)
    assert equal_bits(ours.model, plain)
    assert not equal_bits(plain, tiny_model(name, torch.float64))


def test_a_16_bit_model_trains_in_float32_and_becomes_16_bit_again() -> None:
    model = full("bert", torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    Loop("bert", model, 3).take(3)
    trained = {name: p.detach().clone() for name, p in model.named_parameters()}
    apt.unpatch_model(model)
    assert all(torch.equal(p, trained[name].bfloat16()) for name, p in model.named_parameters())


def test_it_resumes_and_exports_as_a_stock_model(tmp_path: Path) -> None:
    whole = Loop("bert", full("bert", torch.float32), 8).take(3)
    resumed = whole.resumed(full("bert", torch.float32), tmp_path / "checkpoint", 8)
    take_both(whole, resumed, 5)
    assert equal_bits(whole.model, resumed.model)
    apt.export_model(whole.model.eval(), tmp_path / "export")
    from transformers import AutoModelForSequenceClassification

    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "export").eval()
    batch = tiny_batch("bert")
    with torch.no_grad():
        assert torch.equal(stock(**batch).logits, whole.model(**batch).logits)


def test_unpatch_gives_back_what_was_frozen() -> None:
    model = tiny_model("bert")
    model.bert.embeddings.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    apt.patch_model(model, method="full")
    assert apt.summary(model).trainable_params == sum(p.numel() for p in model.parameters())
    assert {name: p.requires_grad for name, p in apt.unpatch_model(model).named_parameters()} == before


def test_a_pruned_model_can_be_tuned_in_full(tmp_path: Path) -> None:
    loop = Loop("bert", apt.patch_model(tiny_model("bert", torch.float32), rank=3).train(), 20, target_sparsity=0.4)
    small = apt.unpatch_model(loop.take(20).model, merge=True)
    before = copy.deepcopy(small)
    Loop("bert", apt.patch_model(small, method="full").train(), 2).take(2)
    assert not equal_bits(small, before)
    assert {name: p.shape for name, p in small.named_parameters()} == {n: p.shape for n, p in before.named_parameters()}


@pytest.mark.parametrize("settings", [{"prune": True}, {"target_modules": ["q"]}])
def test_it_neither_prunes_nor_adapts(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="method 'full' has no adapters: leave out prune and target_modules"):
        apt.patch_model(tiny_model("bert"), method="full", **settings)


def test_nothing_of_it_fits_a_lora_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no adapter"):
        apt.save_adapter(full("bert"), tmp_path / "adapter")


def test_the_demo_runs_so() -> None:
    config = load_config(
        Path("examples/demo.yaml"), ["method=full", "target_modules=null", "learning_rate=3.0e-5"]
    ).apt_config()
    assert (config.method, config.prunes, config.grows) == ("full", False, False)
