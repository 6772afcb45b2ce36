"""A uniform layout keeps to counts that a stock configuration can say, so that `AutoModel` loads what comes of it."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import NAMES, fill_adapters, tiny_batch, tiny_model

import apt
from apt.families import anatomy_of
from apt.families.stock_counts import sayable_heads
from apt.records import PrunePlan
from apt.surgery.prune import apply_prune_plan

ALL_OR_NONE = ["bert", "roberta", "deberta", "distilbert", "gpt2", "opt", "t5"]


@torch.no_grad()
def logits(model: Any, name: str) -> torch.Tensor:
    found: torch.Tensor = model(**tiny_batch(name)).logits
    return found


def load(folder: Path) -> Any:
    kind = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, kind).from_pretrained(folder).eval()


@pytest.mark.parametrize("name", NAMES)
def test_what_a_uniform_search_leaves_is_loaded_by_the_stock_class(name: str, tmp_path: Path) -> None:
    batches = [tiny_batch(name, seed=seed) for seed in range(2)]
    rules = {"layout": "uniform", "repair": "off", "round_to": 1, "calibration_batches": 2}
    model = apt.compress(tiny_model(name, torch.float32), batches, 0.3, **rules)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="export:")
        folder = apt.export_model(fill_adapters(model), tmp_path / "small")
    assert json.loads((folder / "apt_export.json").read_text())["stock"]
    assert torch.equal(logits(load(folder), name), logits(apt.load_model(folder), name))


def equal_plan(model: Any, heads: int) -> PrunePlan:
    """So many heads of each layer, and all neurons but one."""
    kept = {}
    for name, count in apt.summary(model).units.items():
        kept[name] = list(range(heads if name.endswith("heads") else count - 1))
    return PrunePlan(step=1, target_sparsity=0.2, kept=kept, round_to=1)


@pytest.mark.parametrize("name", ["llama", "llama_gqa", "llama_cls"])
def test_a_llama_with_any_number_of_heads_is_written_as_a_mistral(name: str, tmp_path: Path) -> None:
    """Three heads of a width of 32 are no Llama; the arithmetic is the same."""
    model = fill_adapters(apt.patch_model(tiny_model(name, torch.float32), rank=3))
    apply_prune_plan(model, equal_plan(model, 3))
    wanted = logits(model.eval(), name)
    folder = apt.export_model(model, tmp_path / "small")
    stock, ours = load(folder), apt.load_model(folder)
    assert type(stock) is type(ours)
    assert type(stock).__name__.startswith("Mistral")
    assert stock.config.sliding_window is None
    for found in (stock, ours):
        assert (logits(found, name) - wanted).abs().max() < 1e-4 * wanted.abs().max()
    again = apt.export_model(fill_adapters(apt.patch_model(ours, rank=2)), tmp_path / "again")
    assert torch.equal(logits(load(again), name), logits(apt.load_model(again), name))


def test_a_llama_with_biases_stays_one(tmp_path: Path) -> None:
    model = apt.patch_model(tiny_model("llama_bias", torch.float32), rank=3)
    apply_prune_plan(model, equal_plan(model, 3))
    folder = apt.export_model(model, tmp_path / "small")
    card = json.loads((folder / "apt_export.json").read_text())
    assert card["class"] == "LlamaForCausalLM"
    assert not card["stock"]


@pytest.mark.parametrize("name", ["llama_gqa", "llama_bias", "qwen2", "gemma3", "phi3", *ALL_OR_NONE])
def test_sayable_counts_are_those_that_load(name: str, tmp_path: Path) -> None:
    """Each count of heads, tried: an export with it is a stock one just where the count is named."""
    model = tiny_model(name, torch.float32)
    part = anatomy_of(model).attentions[0]
    said = sayable_heads(part)
    assert (said == (part.num_units,)) == (name in ALL_OR_NONE)
    for count in range(1, part.num_units + 1):
        smaller = apt.patch_model(tiny_model(name, torch.float32), rank=3)
        apply_prune_plan(smaller, equal_plan(smaller, count))
        folder = apt.export_model(smaller, tmp_path / str(count))
        assert json.loads((folder / "apt_export.json").read_text())["stock"] == (count in said), count


def test_where_heads_went_before_any_number_of_them_will_do() -> None:
    """As in a run that an older version began: nothing stock is left to keep to."""
    model = apt.patch_model(tiny_model("t5", torch.float32), rank=3)
    apply_prune_plan(model, equal_plan(model, 3))
    assert {sayable_heads(part) for part in anatomy_of(model).attentions} == {(1, 2, 3)}


def test_a_target_that_neurons_alone_cannot_reach_says_why() -> None:
    with pytest.raises(ValueError, match=r"layout 'uniform' \(heads as a stock configuration can say them\) at most"):
        apt.compress(tiny_model("bert"), [tiny_batch("bert")], 0.6, layout="uniform", repair="off")
