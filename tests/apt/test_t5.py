"""What only T5 has: one bias for all layers, two stacks with their own padding, attentions of two kinds in a layer."""

import copy
import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from check import close
from own_loop import BRIEF, Loop, equal_bits, patched, take_both
from tiny_models import fill_adapters, free_heads, random_plan, set_masks, tiny_batch, tiny_model
from torch import Tensor

import apt
from apt.distillation.teacher import Teacher
from apt.families import anatomy_of
from apt.pruning.salience import unit_scores
from apt.pruning.units import find_units
from apt.surgery.prune import apply_prune_plan
from apt.surgery.tails import free_tails

WIDE = torch.float64


def logits(model: Any, **changes: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**tiny_batch("t5") | changes).logits
    return found


def pruned(name: str = "t5", *, empty: tuple[str, ...] = (), keep_tail: bool = False) -> Any:
    model = fill_adapters(apt.patch_model(tiny_model(name), rank=3))
    apply_prune_plan(model, random_plan(model, empty=empty, seed=1), keep_tail=keep_tail)
    return model


def self_attentions(model: Any, stack: str) -> list[Any]:
    return [block.layer[0].SelfAttention for block in model.get_submodule(stack).block]


def biases(model: Any, stack: str) -> list[Tensor]:
    """What each self-attention of a stack adds to its logits, ``[n_heads, T, S]``."""
    found: list[Tensor] = []

    def keep(module: Any, query: Tensor, *args: Any, position_bias: Tensor, **kwargs: Any) -> Any:
        if any(module is attention for attention in self_attentions(model, stack)):
            found.append(position_bias[0])
        return eager_attention_forward(module, query, *args, position_bias=position_bias, **kwargs)

    from transformers import AttentionInterface
    from transformers.models.t5.modeling_t5 import eager_attention_forward

    AttentionInterface.register("kept_bias", keep)
    for module in (model, model.encoder, model.decoder):
        module.config._attn_implementation = "kept_bias"
    logits(model)
    return found


@pytest.mark.parametrize("keep_tail", [False, True], ids=["freed", "tail kept"])
@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_every_layer_adds_the_bias_of_its_own_heads(stack: str, keep_tail: bool) -> None:
    """Against the whole bias of the model as it came, through two events."""
    whole = biases(tiny_model("t5"), stack)[0]
    model = fill_adapters(apt.patch_model(tiny_model("t5")))
    left: dict[str, list[int]] = {}
    for seed in (1, 2):
        plan = random_plan(model, keep=0.6, seed=seed)
        for name, kept in plan.kept.items():
            left[name] = [left.get(name, list(range(40)))[place] for place in kept]
        apply_prune_plan(model, plan, keep_tail=keep_tail)
        found = biases(model, stack)
        assert len(found) == len(self_attentions(model, stack))
        orders = [left[f"{stack}.{index}.heads"] for index in range(len(found))]
        for ours, order in zip(found, orders, strict=True):
            assert torch.equal(ours, whole[order])
    assert len({*map(tuple, orders), (0, 1, 2, 3)}) == len(found) + 1  # no two layers have the same, and none is whole


def test_an_encoder_whose_first_layer_is_empty_has_its_bias_still() -> None:
    whole = biases(tiny_model("t5"), "encoder")[1]
    model = apt.patch_model(tiny_model("t5"))
    plan = random_plan(model, empty=["encoder.0.heads"], seed=1)
    apply_prune_plan(model, plan)
    found = biases(model, "encoder")[0]
    assert torch.equal(found, whole[plan.kept["encoder.1.heads"]])
    table = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    assert torch.equal(model.state_dict()[table], tiny_model("t5").state_dict()[table])
    assert [name for name in model.state_dict() if name.startswith("encoder.block.0.layer.0.SelfAttention")] == [table]


@pytest.mark.parametrize("name", ["t5", "t5_gated"])
def test_a_dense_teacher_on_a_pruned_student(name: str) -> None:
    """The model as it was, in the new order of its heads, also after its first layer is empty; the student is whole."""
    model = fill_adapters(apt.patch_model(tiny_model(name), rank=3))
    batch = tiny_batch(name)
    wanted = logits(model)
    teacher = Teacher(anatomy_of(model))
    teacher.snapshot()
    for number, empty in enumerate(([], ["encoder.0.heads"], free_heads(model)), 1):
        apply_prune_plan(model, random_plan(model, empty=empty, seed=number), keep_tail=True)
        before = logits(model)
        assert not torch.allclose(before, wanted)
        close(f"teacher after event {number}", teacher.forward(batch).logits, wanted)
        assert torch.equal(logits(model), before)
    free_tails(model)
    close("student without the tails", logits(model), before)
    apply_prune_plan(model, random_plan(model, seed=9))
    assert model.generate(batch["input_ids"], max_new_tokens=3).shape == (4, 4)


def test_no_weights_of_an_empty_attention_stay() -> None:
    model = apt.patch_model(tiny_model("t5"))
    gone = weakref.ref(self_attentions(model, "encoder")[0])
    apply_prune_plan(model, random_plan(model, seed=1))
    apply_prune_plan(model, random_plan(model, empty=["encoder.0.heads"], seed=2), keep_tail=True)
    free_tails(model)
    gc.collect()
    assert gone() is None


def test_a_copy_of_a_pruned_model_has_hooks_of_its_own() -> None:
    model = pruned()
    twin = copy.deepcopy(model)
    wanted = logits(twin)
    apply_prune_plan(model, random_plan(model, empty=free_heads(model), seed=2))
    close("logits", logits(twin), wanted)
    for attention in self_attentions(twin, "encoder"):
        assert attention.compute_bias._model() is attention


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_with_recomputed_layers(reentrant: bool) -> None:
    found = []
    for recompute in (False, True):
        model = pruned(empty=("encoder.0.heads",)).train()
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(**tiny_batch("t5")).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        close(name, found[1][name], grad)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_masked_equals_shrunk_in_every_implementation(attention: str) -> None:
    model = fill_adapters(apt.patch_model(tiny_model("t5", attn_implementation=attention)))
    assert model.encoder.config._attn_implementation == attention
    plan = random_plan(model, empty=free_heads(model), seed=1)
    set_masks(model, plan)
    masked = logits(model)
    apply_prune_plan(model, plan)
    close("logits", logits(model), masked)


def test_beam_search_with_empty_attentions() -> None:
    model, source = pruned(), tiny_batch("t5")
    apply_prune_plan(model, random_plan(model, empty=free_heads(model), seed=2))
    inputs = {key: source[key] for key in ("input_ids", "attention_mask")}
    settings = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False}
    cached, plain = (model.generate(**inputs, **settings, use_cache=use) for use in (True, False))
    assert cached.shape == (4, 7)
    assert torch.equal(cached, plain)


def scores(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    groups = find_units(anatomy_of(model))
    for group in groups:
        group.mask.sums, group.mask.count = group.mask.sums.to(WIDE), group.mask.count.to(WIDE)
        group.mask.collecting = True
        group.mask.reset_sums()
    model(**batch).loss.backward()
    return {group.name: unit_scores(group) for group in groups}


def test_scores_do_not_see_padding_on_either_side() -> None:
    model, batch = fill_adapters(apt.patch_model(tiny_model("t5"), rank=2)), tiny_batch("t5")
    wanted = scores(model, batch)
    for stack, more in (("input_ids", 5), ("labels", 3)):
        batch = dict(batch)
        fill = torch.full((4, more), 0 if stack == "input_ids" else -100)
        batch[stack] = torch.cat([batch[stack], fill], dim=1)
        if stack == "input_ids":
            batch["attention_mask"] = torch.cat([batch["attention_mask"], torch.zeros_like(fill)], dim=1)
        for name, score in scores(model, batch).items():
            close(f"{name}, {more} more of {stack}", score, wanted[name])


SOURCES = {  # of the decoder's valid tokens, the first that is given
    "labels": (("labels",), lambda b: (b["labels"] != -100).sum()),
    "decoder_attention_mask": (("labels", "decoder_attention_mask"), lambda b: b["decoder_attention_mask"].sum()),
    "neither": (("decoder_input_ids",), lambda b: (b["labels"] != -100).sum()),  # of which the ids were made
}


@pytest.mark.parametrize(("given", "count"), SOURCES.values(), ids=SOURCES)
def test_tokens_of_each_stack_are_counted_by_its_own_mask(given: tuple[str, ...], count: Any) -> None:
    model, batch = apt.patch_model(tiny_model("t5", eos_token_id=1)), tiny_batch("t5")
    for row in batch["labels"]:
        row[(row != -100).sum() - 1] = 1  # where the text ends
    batch["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(batch["labels"])
    batch["decoder_attention_mask"] = torch.ones_like(batch["labels"])
    batch["decoder_attention_mask"][:, 4:] = 0
    for group in find_units(anatomy_of(model)):
        group.mask.collecting = True
    model(**{key: batch[key] for key in ("input_ids", "attention_mask", *given)}).logits.sum().backward()
    for group in find_units(anatomy_of(model)):
        wanted = batch["attention_mask"].sum() if group.part.layer.stack.name == "encoder" else count(batch)
        assert group.mask.count == wanted, group.name


@pytest.mark.parametrize("name", ["t5", "t5_gated"])
def test_a_run_reaches_its_target(name: str) -> None:
    loop = Loop(name, patched(name), 30, target_sparsity=0.5, verify_events=True, **BRIEF).take(30)
    counts = apt.summary(loop.model)
    assert [event.step for event in loop.run.events] == [6, 12, 18]
    assert 0.5 <= counts.sparsity == loop.run.events[-1].sparsity <= 0.55
    assert counts.units["decoder.0.heads"] >= 1
    assert counts.units["decoder.1.cross_heads"] >= 1
    assert loop.run.pruning.units.outliers.mode == "off"  # as for encoders
    assert "decoder cross_heads" in str(counts)


def test_a_distilled_run_ends_in_a_model_that_is_exported(tmp_path: Path) -> None:
    """Its teacher is dense while encoder, decoder and cross-attention heads go."""
    settings = {"use_self_distillation": True, "verify_events": True, **BRIEF}
    loop = Loop("t5", patched("t5"), 40, target_sparsity=0.5, **settings).take(40)
    assert apt.summary(loop.model).sparsity >= 0.5
    model = apt.load_model(apt.export_model(loop.model.eval(), tmp_path / "export"))
    close("logits", logits(model), logits(loop.model))


def test_the_floors_hold_at_any_sparsity() -> None:
    loop = Loop("t5", patched("t5"), 30, target_sparsity=0.9, num_events=1, prune_end=10, round_to=1).take(10)
    units = apt.summary(loop.model).units
    assert units["decoder.0.heads"] >= 1
    assert units["decoder.1.cross_heads"] >= 1
    assert sum(count for name, count in units.items() if name.endswith("heads")) < 12  # of 28


def test_a_run_goes_on_from_files_bit_for_bit(tmp_path: Path) -> None:
    settings = {"target_sparsity": 0.6, "num_events": 3, "prune_end": 24, "round_to": 4}
    first = Loop("t5", patched("t5"), 30, **settings).take(12)
    assert apt.summary(first.model).masked > 0
    second = first.resumed(patched("t5"), tmp_path, **settings)
    take_both(first, second, 18)
    assert len(first.run.events) == 3
    assert equal_bits(second.model, first.model)
    assert torch.equal(logits(second.model), logits(first.model))


def test_a_uniform_layout_has_one_count_for_all_ffns_and_keeps_all_heads() -> None:
    """No stock configuration of T5 can say which heads of the shared bias a layer has."""
    loop = Loop("t5", patched("t5"), 30, target_sparsity=0.3, layout="uniform", **BRIEF).take(30)
    counts = apt.summary(loop.model)
    assert counts.heads == [4] * 7
    assert len(set(counts.neurons)) == 1
    assert counts.sparsity >= 0.3


def test_an_export_without_its_head_order_is_refused(tmp_path: Path) -> None:
    folder = apt.export_model(pruned(), tmp_path / "export")
    (folder / "apt_files.json").unlink()  # as of one that was changed on purpose
    path = folder / "apt_export.json"
    card = json.loads(path.read_text())
    assert card["head_order"].keys() == {name for name, n in card["units"].items() if name.endswith("heads") and n < 4}
    own = card["head_order"]["encoder.1.heads"]
    odd: tuple[list[Any], ...] = ([0, 1, 2, 3, 0], [99] * len(own), [float(head) for head in own], own[::-1])
    assert len(own) > 1
    for orders in ({}, *({**card["head_order"], "encoder.1.heads": order} for order in (*odd, own[:1] * len(own)))):
        path.write_text(json.dumps(card | {"head_order": orders}))
        with pytest.raises(
            ValueError, match=r"load_model: .* is corrupt \(head_order of '?encoder\.\d\.heads'? is .*\)"
        ):
            apt.load_model(folder)


def test_a_loaded_model_is_pruned_and_exported_again(tmp_path: Path) -> None:
    """Places of heads are those of the first model, also in the second export."""
    model = apt.load_model(apt.export_model(pruned(), tmp_path / "one"))
    apt.patch_model(model)
    plan = random_plan(model, empty=["encoder.0.heads"], seed=5)
    set_masks(model, plan)
    masked = logits(model)
    apply_prune_plan(model, plan)
    close("logits", logits(model), masked)
    again = apt.load_model(apt.export_model(model, tmp_path / "two"))
    close("logits", logits(again), masked)
    apt.unpatch_model(model, merge=True)
    close("logits", logits(model), masked)


def test_an_encoder_alone() -> None:
    from transformers import T5EncoderModel

    model: Any = apt.patch_model(T5EncoderModel(tiny_model("t5").config).double())
    assert list(apt.summary(model).units) == [f"encoder.{i}.{kind}" for i in range(3) for kind in ("heads", "neurons")]
    inputs = {key: tiny_batch("t5")[key] for key in ("input_ids", "attention_mask")}
    plan = random_plan(model, empty=["encoder.0.heads"], seed=1)
    set_masks(model, plan)
    masked = model(**inputs).last_hidden_state
    apply_prune_plan(model, plan)
    close("states", model(**inputs).last_hidden_state, masked)


HEADS = {
    "T5ForQuestionAnswering": {"qa_outputs"},
    "T5ForSequenceClassification": {"classification_head.dense", "classification_head.out_proj"},
    "T5ForTokenClassification": {"classifier"},
    "T5ForConditionalGeneration": set(),
}


@pytest.mark.parametrize(("kind", "heads"), HEADS.items(), ids=HEADS)
def test_task_heads_train_in_full(kind: str, heads: set[str]) -> None:
    import transformers

    config = copy.deepcopy(tiny_model("t5").config)
    model = apt.patch_model(getattr(transformers, kind)(config))
    found = {name.rpartition(".")[0] for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
    assert found == heads


def test_umt5_is_refused() -> None:
    from transformers import UMT5Config, UMT5ForConditionalGeneration

    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 10}
    with pytest.raises(ValueError, match="model_type 'umt5' cannot be pruned; known are"):
        apt.patch_model(UMT5ForConditionalGeneration(UMT5Config(**sizes)))
