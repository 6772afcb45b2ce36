"""Layers that lost all their heads, beside the same model with those heads masked: what others read layer by layer."""

import copy
import sys
from typing import Any

import pytest
import torch
from check import close
from tiny_models import fill_adapters, free_heads, random_plan, set_masks, tiny_batch, tiny_model

import apt
from apt.families import EmptyAttention, anatomy_of
from apt.records import PrunePlan
from apt.surgery.prune import apply_prune_plan

FAMILIES = ["bert", "roberta", "distilbert", "deberta", "llama", "mistral", "gpt2", "opt", "phi3", "t5", "mt5"]
LISTS = ("attentions", "encoder_attentions", "decoder_attentions", "cross_attentions")
STATES = ("hidden_states", "encoder_hidden_states", "decoder_hidden_states")
STACKS = {"encoder_attentions": "encoder", "decoder_attentions": "decoder", "attentions": "layers"}


def emptied(model: Any, groups: list[str]) -> Any:
    """A patched model after an event at which these groups lost all heads, and nothing else went."""
    fill_adapters(apt.patch_model(model))
    apply_prune_plan(model, random_plan(model, empty=groups, keep=1.0, seed=1))
    return model.eval()


def outputs(model: Any, name: str) -> Any:
    with torch.no_grad():
        return model(**tiny_batch(name), output_attentions=True, output_hidden_states=True)


@pytest.mark.parametrize("asked", ["never before", "before the event"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_layer_without_heads_has_none_in_its_place(name: str, asked: str) -> None:
    """The others stay where they were; asked before, as then the attentions have hooks that go with them."""
    model = fill_adapters(apt.patch_model(tiny_model(name, attn_implementation="eager")))
    masked: Any = copy.deepcopy(model)
    if asked == "before the event":
        outputs(model, name)
    groups = [group for group in free_heads(model) if ".1." in group]
    plan = PrunePlan(step=1, target_sparsity=0.1, kept={group: [] for group in groups}, round_to=1)
    set_masks(masked, plan)
    apply_prune_plan(model, plan)
    found, wanted = outputs(model, name), outputs(masked, name)
    compared = 0
    for key in LISTS:
        weights, others = getattr(found, key, None) or (), getattr(wanted, key, None) or ()
        assert len(weights) == len(others), key
        stack = STACKS.get(key, "decoder")
        kind = "cross_heads" if key == "cross_attentions" else "heads"
        for index, (own, other) in enumerate(zip(weights, others, strict=True)):
            assert (own is None) == (f"{stack}.{index}.{kind}" in groups), (key, index)
            if own is not None:
                close(f"{key} {index}", own, other)
                compared += 1
    assert compared >= 2
    for key in STATES:
        for index, (own, other) in enumerate(
            zip(getattr(found, key, None) or (), getattr(wanted, key, None) or (), strict=True)
        ):
            close(f"{key} {index}", own, other)


def test_an_export_lists_them_alike(tmp_path: Any) -> None:
    model = emptied(tiny_model("t5", torch.float32), ["decoder.1.heads", "decoder.0.cross_heads"])
    apt.export_model(model, tmp_path / "export")
    loaded = apt.load_model(tmp_path / "export")
    found = outputs(loaded, "t5")
    if found.decoder_attentions[0] is None:  # sdpa answers no weights
        loaded.set_attn_implementation("eager")
        found = outputs(loaded, "t5")
    assert [own is None for own in found.decoder_attentions] == [False, True]
    assert [own is None for own in found.cross_attentions] == [True, False]


@pytest.mark.parametrize("how", ["prompt lookup", "assisted"])
@pytest.mark.parametrize("name", ["mistral", "phi3_sliding", "qwen2_mixed", "gemma3", "llama"])
def test_drafts_are_taken_back_from_every_cache(name: str, how: str) -> None:
    """A cache with a sliding window is cropped layer by layer, and the tokens are those of plain generation."""
    model = tiny_model(name, torch.float32, sliding_window=32)
    model = emptied(model, ["layers.2.heads"])  # which slides, where layers differ
    assert any(isinstance(module, EmptyAttention) for module in model.modules())
    ids = tiny_batch(name)["input_ids"][:1, :6]
    draft: dict[str, Any] = {"prompt_lookup_num_tokens": 2}
    if how == "assisted":
        draft = {"assistant_model": tiny_model(name, torch.float32, sliding_window=32)}
    with torch.no_grad():
        plain = model.generate(ids, max_new_tokens=12, do_sample=False)
        drafted = model.generate(ids, max_new_tokens=12, do_sample=False, **draft)
    assert torch.equal(plain, drafted)


def test_an_encoder_that_is_a_decoder_keeps_a_head_in_its_first_layer() -> None:
    """BERT with `is_decoder` reads the length of its cache there."""
    from transformers import BertLMHeadModel

    config = copy.deepcopy(tiny_model("bert_mlm").config)
    config.is_decoder = True
    model: Any = BertLMHeadModel(config).eval()
    assert "layers.0.heads" in anatomy_of(model).required_heads()
    assert "layers.0.heads" not in anatomy_of(tiny_model("bert_mlm")).required_heads()
    emptied(model, ["layers.1.heads", "layers.2.heads"])
    ids = tiny_batch("llama")["input_ids"][:1]
    with torch.no_grad():
        whole = model(ids).logits
        begun = model(ids[:, :5], use_cache=True)
        rest = model(ids[:, 5:], past_key_values=begun.past_key_values, use_cache=True).logits
    close("with a cache", rest, whole[:, 5:])


@pytest.mark.parametrize("lacks", ["the module", "the name"])
def test_it_answers_where_transformers_keeps_no_lists(lacks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are private there, so a later one may have others, or none."""
    place = "transformers.utils.output_capturing"
    model = emptied(tiny_model("bert"), ["layers.1.heads"])
    empty = next(module for module in model.modules() if isinstance(module, EmptyAttention))
    hidden = torch.randn(2, 3, 32, dtype=torch.float64)
    wanted = empty(hidden)[0]
    if lacks == "the name":
        monkeypatch.delattr(f"{place}._active_collector")
    else:
        monkeypatch.setitem(sys.modules, place, None)
    answer, weights = empty(hidden)
    assert weights is None
    assert torch.equal(answer, wanted)
