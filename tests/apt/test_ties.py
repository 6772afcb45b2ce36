"""A head that is the table of embeddings, or no longer: an export says which, to our reader and to the stock one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from check import close
from safetensors.torch import load_file
from tiny_models import fill_adapters, tiny_batch, tiny_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

import apt
from apt.export.fuse import fuse_adapters

HEADS = {
    "llama_gqa": ("q_proj", "lm_head"),
    "gpt2": ("c_attn", "lm_head"),
    "opt": ("q_proj", "lm_head"),
    "t5": ("q", "lm_head"),
    "bert_mlm": ("query", "cls.predictions.decoder"),
}
MERGING = ("adalora", "adalora_simple", "gsa", "spectral_a", "spectral_r")


def logits(model: Any, name: str) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**tiny_batch(name)).logits
    return found


def stock(name: str, folder: Path) -> Any:
    """What transformers reads from a folder."""
    kinds = {"t5": AutoModelForSeq2SeqLM, "t5_gated": AutoModelForSeq2SeqLM, "bert_mlm": AutoModelForMaskedLM}
    kind: Any = kinds.get(name, AutoModelForCausalLM)
    return kind.from_pretrained(folder).eval()


def trained(model: nn.Module) -> nn.Module:
    """With other numbers in everything that trains."""
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    return model


def check_readers(model: Any, name: str, folder: Path) -> dict[str, Tensor]:
    """Export a model, have it read by ours and by transformers, and return the tensors of the file."""
    wanted = logits(model, name)
    apt.export_model(model, folder)
    for reader in (apt.load_model(folder), stock(name, folder)):
        close(f"{name} by {type(reader).__module__}", logits(reader, name), wanted)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("name", HEADS)
def test_an_adapter_on_a_tied_head_outlives_the_export(name: str, tmp_path: Path) -> None:
    model = apt.patch_model(tiny_model(name, torch.float32), method="lora", target_modules=HEADS[name])
    plain = logits(model, name)
    wanted = logits(fill_adapters(model), name)
    assert (wanted - plain).abs().max() > 0.1
    check_readers(model, name, tmp_path / "export")
    says = json.loads((tmp_path / "export/config.json").read_text())["tie_word_embeddings"]
    assert says == (name == "t5")  # whose configuration ties in any case: there the tensors say it
    assert model.config.tie_word_embeddings  # of the model in memory, whose adapter is not merged
    apt.unpatch_model(model, merge=True)
    if name != "t5":
        model.tie_weights()  # as resize_token_embeddings does
    close("merged", logits(model, name), wanted)
    model.save_pretrained(tmp_path / "merged")
    close("saved", logits(stock(name, tmp_path / "merged"), name), wanted)


@pytest.mark.parametrize("method", MERGING)
def test_every_method_that_merges_keeps_its_head(method: str, tmp_path: Path) -> None:
    targets = HEADS["llama_gqa"]
    model = apt.patch_model(tiny_model("llama_gqa", torch.float32), method=method, target_modules=targets, rank=2)
    check_readers(trained(model), "llama_gqa", tmp_path / "export")


def test_a_tie_that_holds_is_stored_once(tmp_path: Path) -> None:
    """A fresh adapter changes nothing, so the head is the table still."""
    model = apt.patch_model(tiny_model("llama_gqa", torch.float32), method="lora", target_modules=["lm_head"])
    assert "lm_head.weight" not in check_readers(model, "llama_gqa", tmp_path / "export")
    assert json.loads((tmp_path / "export/config.json").read_text())["tie_word_embeddings"]
    loaded = apt.load_model(tmp_path / "export")
    assert loaded.get_parameter("lm_head.weight") is loaded.get_parameter("model.embed_tokens.weight")


def own_head(name: str) -> Any:
    """A model whose head the user gave a weight of its own, though the configuration ties it."""
    model = tiny_model(name, torch.float32)
    model.lm_head.weight = nn.Parameter(torch.randn(model.lm_head.weight.shape) * 0.2)
    return model


@pytest.mark.parametrize("name", ["llama_gqa", "gpt2", "t5_gated"])
def test_a_head_that_was_untied_stays_so(name: str, tmp_path: Path) -> None:
    """By the user, or, as in T5 v1.1 (flan-t5), by the checkpoint: every configuration of T5 says that it is tied."""
    model = own_head(name)
    wanted = logits(model, name)
    assert "lm_head.weight" in check_readers(apt.patch_model(model), name, tmp_path / "export")
    close("the model that came", logits(apt.load_model(tmp_path / "export"), name), wanted)


@pytest.mark.parametrize("places", [("lm_head", "q_proj"), ("q_proj", "lm_head")], ids=" first, then ".join)
def test_adapters_on_a_tied_head_are_averaged(places: tuple[str, str]) -> None:
    """One of the two models has an adapter on its head, so the mean head is half way; the table stays."""
    models = {
        place: fill_adapters(
            apt.patch_model(tiny_model("llama_gqa", torch.float32), method="lora", target_modules=[place])
        )
        for place in places
    }
    head: Any = models["lm_head"].get_submodule("lm_head")
    fused = fuse_adapters(list(models.values()))
    table = tiny_model("llama_gqa", torch.float32).model.embed_tokens.weight.detach()
    close("table", fused.get_parameter("model.embed_tokens.weight").detach(), table)
    close("head", fused.get_parameter("lm_head.weight").detach(), (head.merged_weight() + table) / 2)
