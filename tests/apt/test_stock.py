"""Exports that need nothing of ours: a stock config describes them, or the export says what it cannot describe."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from check import close
from tiny_models import CLASSIFIERS, GENERATORS, NAMES, SEQ2SEQ, fill_adapters, tiny_batch, tiny_model

import apt
from apt.families import anatomy_of
from apt.layers.derived import plain_class
from apt.pruning.units import find_units
from apt.records import PrunePlan
from apt.surgery.prune import apply_prune_plan

EXPRESS_HEADS = ("llama", "llama_gqa", "llama_bias", "llama_cls", "mistral", "qwen2", "qwen2_mixed", "qwen3")
EXPRESS_HEADS += ("gemma2", "gemma3", "phi3", "phi3_sliding")


def shrunk(name: str, heads: int | None, neurons: int | None, **settings: Any) -> Any:
    """A patched model with so many heads and neurons in every layer, others in each."""
    model = fill_adapters(apt.patch_model(tiny_model(name, torch.float32), rank=3, **settings))
    draw, kept = torch.Generator().manual_seed(4), {}
    for group in find_units(anatomy_of(model)):
        count = heads if group.kind == "head" else neurons
        order = torch.randperm(group.num_units, generator=draw)
        kept[group.name] = sorted(order[:count].tolist())
    apply_prune_plan(model, PrunePlan(step=1, target_sparsity=0.5, kept=kept, round_to=1))
    return model


def auto_class(name: str) -> Any:
    if name in CLASSIFIERS:
        return transformers.AutoModelForSequenceClassification
    if name in GENERATORS and name not in SEQ2SEQ:
        return transformers.AutoModelForCausalLM
    return transformers.AutoModelForMaskedLM if "mlm" in name else transformers.AutoModelForSeq2SeqLM


@pytest.mark.filterwarnings("error:export")
@pytest.mark.parametrize("name", NAMES)
def test_auto_model_loads_a_uniform_export(name: str, tmp_path: Path) -> None:
    heads = 2 if name in EXPRESS_HEADS else None
    model = shrunk(name, heads, 24, layout="uniform")
    saved = model.config.to_dict()
    apt.export_model(model, tmp_path / "export")
    assert model.config.to_dict() == saved
    card = json.loads((tmp_path / "export/apt_export.json").read_text())
    assert (card["stock"], card["why_not_stock"]) == (True, None)
    stock, report = auto_class(name).from_pretrained(tmp_path / "export", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(stock) is plain_class(model)
    batch = tiny_batch(name)
    with torch.no_grad():
        wanted = model(**batch).logits
        for other in (stock.eval(), apt.load_model(tmp_path / "export")):
            close("logits", other(**batch).logits, wanted)
    if name in GENERATORS:
        ids = batch["input_ids"][::4, :6]
        settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
        assert torch.equal(stock.generate(ids, **settings), model.generate(ids, **settings))


@pytest.mark.parametrize(
    ("name", "heads", "why"),
    [
        ("bert", 2, "BertConfig derives the size of a head from the number of heads, so it cannot say 2 of 4"),
        ("gpt2", 3, "GPT2Config derives the size of a head"),
        ("t5", 2, "T5Config cannot say which 2 of 4 heads a layer has"),
        ("llama_bias", 3, r"The hidden size \(32\) is not a multiple of the number of attention heads \(6\)"),
        ("llama", 0, "describes no layer without heads"),
    ],
)
def test_what_no_stock_config_describes_is_said(name: str, heads: int, why: str, tmp_path: Path) -> None:
    model = shrunk(name, heads, 24, layout="uniform")
    with pytest.warns(UserWarning, match=f"AutoModel alone cannot load it: .*{why}.*; apt.load_model can"):
        apt.export_model(model, tmp_path / "export")
    card = json.loads((tmp_path / "export/apt_export.json").read_text())
    assert card["stock"] is False
    assert why.split()[0].replace("\\", "") in card["why_not_stock"]
    with torch.no_grad():
        batch = tiny_batch(name)
        close("logits", apt.load_model(tmp_path / "export")(**batch).logits, model(**batch).logits)


def test_layers_of_their_own_sizes_keep_the_config_and_say_so(tmp_path: Path) -> None:
    model = fill_adapters(apt.patch_model(tiny_model("llama", torch.float32)))
    plan = PrunePlan(step=1, target_sparsity=0.1, kept={"layers.1.neurons": list(range(8))}, round_to=1)
    apply_prune_plan(model, plan)
    apt.export_model(model, tmp_path / "export")
    card = json.loads((tmp_path / "export/apt_export.json").read_text())
    assert card["why_not_stock"] == "LlamaConfig has one number of neurons for all layers, but they have 8 to 40"
    assert json.loads((tmp_path / "export/config.json").read_text())["intermediate_size"] == 40


def test_a_uniform_export_is_patched_and_exported_again(tmp_path: Path) -> None:
    """The second time from the numbers of the first."""
    apt.export_model(shrunk("phi3", 3, 24), tmp_path / "first")
    model = fill_adapters(apt.patch_model(apt.load_model(tmp_path / "first")))
    apply_prune_plan(
        model,
        PrunePlan(
            step=1,
            target_sparsity=0.1,
            kept={g.name: [0, 2] for g in find_units(anatomy_of(model))},
            round_to=1,
        ),
    )
    apt.export_model(model, tmp_path / "second")
    config = json.loads((tmp_path / "second/config.json").read_text())
    counts = [config[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size")]
    assert counts == [4, 2, 4, 2]
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "second").eval()
    with torch.no_grad():
        close("logits", stock(**tiny_batch("phi3")).logits, model(**tiny_batch("phi3")).logits)
