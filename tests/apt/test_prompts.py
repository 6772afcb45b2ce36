"""P-tuning and prefix tuning: what they compute, on whole and on pruned models, and what trains."""

import copy
from typing import Any

import pytest
import torch
from check import Unrounded, close
from tiny_models import MODELS, free_heads, random_plan, tiny_batch, tiny_model
from torch import Tensor
from transformers import AttentionInterface

import apt
from apt.families import anatomy_of
from apt.methods.prompts import PrefixTuning
from apt.pruning.units import find_units
from apt.surgery.prune import apply_prune_plan

METHODS = ["p_tuning", "prefix_tuning"]
KINDS = ["bert", "roberta", "llama_gqa", "gpt2", "opt", "t5"]
GENERATORS = ["llama_gqa", "gpt2", "opt", "mistral", "gemma2", "t5_gated"]
P = 5


def prompted(kind: str, method: str, dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    torch.manual_seed(7)
    return apt.patch_model(tiny_model(kind, dtype), method=method, num_virtual_tokens=P, **settings)


def pruned(kind: str, empty: tuple[str, ...] = ()) -> tuple[Any, Any, dict[str, list[int]]]:
    """A plain pruned model, the whole one with zeros in what reads the pruned units, and the kept positions."""
    whole = apt.patch_model(tiny_model(kind))
    plan = random_plan(whole, empty=empty, seed=5)
    cut = copy.deepcopy(whole)
    apply_prune_plan(cut, plan)
    for group in find_units(anatomy_of(whole)):
        gone = torch.ones(group.num_units, dtype=torch.bool)
        gone[plan.kept[group.name]] = False
        columns = gone.repeat_interleave(group.reader.n_in // group.num_units)
        group.reader.weight.data[:, columns] = 0.0
    return apt.unpatch_model(cut), apt.unpatch_model(whole), plan.kept


def logits(model: Any, batch: dict[str, Tensor], **more: Any) -> Tensor:
    with torch.no_grad(), Unrounded():
        found = model(**batch, **more).logits
    assert isinstance(found, Tensor)
    return found


def test_the_document_s_classes() -> None:
    tokens = apt.PTuningEmbedding(20, embedding_dimension=768, hidden_dimension=512, dropout_probability=0.1)
    assert tokens(4).shape == (4, 20, 768)
    assert tokens(1)[0].mean(-1).abs().max() < 1e-5  # the layer norm comes last
    prefixes = apt.PrefixTuning(
        num_layers=12, num_heads=12, head_dimension=64, prefix_length=20, dropout_probability=0.0
    )
    key, value = prefixes.get_prefix_states(3)
    assert key.shape == value.shape == (20, 12, 64)
    flat = prefixes.prefix_embeddings[3]
    assert torch.equal(key.reshape(20, -1), flat[:, : 12 * 64])
    assert torch.equal(value.reshape(20, -1), flat[:, 12 * 64 :])


@pytest.mark.parametrize("projects", [False, True])
def test_layers_may_differ_in_heads(projects: bool) -> None:
    prefixes = PrefixTuning(3, [4, 0, 1], 8, 6, prefix_projection=projects, hidden_dimension=10)
    for layer, (key, value) in enumerate(prefixes()):
        heads = [4, 0, 1][layer]
        assert key.shape == value.shape == (6, heads, 8)
        for mine, own in zip((key, value), prefixes.get_prefix_states(layer), strict=True):
            assert torch.equal(mine, own)
    with pytest.raises(ValueError, match="num_heads has 2 entries for 3 layers"):
        PrefixTuning(3, [4, 1], 8, 6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_only_the_prompt_and_the_head_train(kind: str, method: str) -> None:
    model = prompted(kind, method).train()
    model(**tiny_batch(kind)).loss.backward()
    for name, parameter in model.named_parameters():
        trains = name.startswith(("apt_prompt.", "classifier.", "bert.pooler."))
        assert parameter.requires_grad == trains, name
        assert (parameter.grad is not None and bool(parameter.grad.any())) == trains, name
    counts = apt.summary(model)
    assert counts.virtual_tokens == P
    assert not counts.ranks
    assert "5 virtual tokens" in str(counts)


@pytest.mark.parametrize("kind", ["bert", "roberta", "llama_gqa", "gpt2", "opt"])
def test_a_pruned_model_attends_to_the_prefixes(kind: str) -> None:
    """Beside attention written out, with the prefixes before the keys and values, without any cache."""
    small, _, _ = pruned(kind)
    heads = [count for name, count in anatomy_of(small).num_units().items() if name.endswith("heads")]
    assert len(set(heads)) > 1
    model = apt.patch_model(copy.deepcopy(small), method="prefix_tuning", num_virtual_tokens=P)
    prefixes = model.apt_prompt
    batch = tiny_batch(kind)
    batch.pop("labels")
    mask, length = batch["attention_mask"].bool(), batch["input_ids"].shape[1]
    causal = MODELS[kind].model.endswith(("CausalLM", "LMHeadModel"))
    seen = mask[:, None, :].expand(-1, length, -1)
    seen = seen & torch.ones(length, length, dtype=torch.bool).tril() if causal else seen
    seen = torch.cat([torch.ones(len(mask), length, P, dtype=torch.bool), seen], dim=2)[:, None]

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, scaling: float, **kwargs: Any) -> Any:
        own = prefixes.get_prefix_states(module.layer_idx)
        k, v = (
            torch.cat([new.permute(1, 0, 2).expand(len(q), -1, -1, -1), old], dim=2)
            for new, old in zip(own, (k, v), strict=True)
        )
        k, v = (states.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for states in (k, v))
        scores = (q @ k.transpose(2, 3) * scaling).masked_fill(~seen, -torch.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2), None

    AttentionInterface.register("written_out", attend)
    small.config._attn_implementation = "written_out"
    start = 1 if kind == "roberta" else 0  # behind the position of padding
    positions = P + start + mask.cumsum(1) - 1 if kind in ("opt", "roberta") else P + torch.arange(length)[None]
    positions = positions.expand(len(mask), -1)
    wanted, found = logits(small, batch, position_ids=positions), logits(model, batch)
    rows = mask if causal else slice(None)
    close("logits", found[rows], wanted[rows])


@pytest.mark.parametrize("emptied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_pruned_model_is_the_masked_one(kind: str, emptied: bool) -> None:
    """Prefixes of the kept heads on the pruned model; of all heads on the whole one, whose pruned heads write zeros."""
    free = free_heads(apt.patch_model(tiny_model(kind))) if emptied else []
    small, whole, kept = pruned(kind, tuple(free[:1]))
    stack = "decoder." if kind == "t5" else "layers."
    ours, theirs = (apt.patch_model(m, method="prefix_tuning", num_virtual_tokens=P) for m in (small, whole))
    with torch.no_grad():
        for layer, (mine, other) in enumerate(
            zip(ours.apt_prompt.prefix_embeddings, theirs.apt_prompt.prefix_embeddings, strict=True)
        ):
            heads = theirs.apt_prompt.num_heads[layer]
            mine.copy_(other.view(P, 2, heads, -1)[:, :, kept[f"{stack}{layer}.heads"]].reshape(P, -1))
    if emptied and kind == "bert":
        assert ours.apt_prompt.num_heads[0] == 0
    batch = tiny_batch(kind)
    close("logits", logits(ours, batch), logits(theirs, batch))
    if kind in GENERATORS:
        ids = batch["input_ids"][:1]
        settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
        assert torch.equal(ours.generate(ids, **settings), theirs.generate(ids, **settings))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", GENERATORS)
def test_a_step_with_the_cache_is_the_whole_pass(kind: str, method: str) -> None:
    model, length = prompted(kind, method), 9
    ids = tiny_batch(kind, size=3, length=length)["input_ids"].clamp(min=1)
    ones = torch.ones_like(ids)
    name = "decoder_input_ids" if kind.startswith("t5") else "input_ids"
    source = {"input_ids": ids.flip(0), "attention_mask": ones} if kind.startswith("t5") else {}
    mask = "decoder_attention_mask" if kind.startswith("t5") else "attention_mask"
    wanted = logits(model, {**source, name: ids, mask: ones})
    cache, found = None, []
    for start, end in ((0, 4), (4, 5), (5, length)):
        with torch.no_grad(), Unrounded():
            step = model(
                **source, **{name: ids[:, start:end], mask: ones[:, :end]}, past_key_values=cache, use_cache=True
            )
        cache = step.past_key_values
        found.append(step.logits)
    close("logits", torch.cat(found, dim=1), wanted)
    assert wanted.shape[1] == length
    assert cache.get_seq_length() == length + (0 if kind.startswith("t5") and method == "p_tuning" else P)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["llama_gqa", "gpt2", "opt"])  # in a window, padding hides the prompt
def test_padding_on_the_left_changes_no_text(kind: str, method: str) -> None:
    model = prompted(kind, method)
    ids = tiny_batch(kind, size=2, length=7)["input_ids"].clamp(min=1)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    ids[1, :3] = 0
    settings = {"max_new_tokens": 6, "do_sample": False}
    together = model.generate(ids, attention_mask=mask, **settings)
    alone = model.generate(ids[1:, 3:], attention_mask=mask[1:, 3:], **settings)
    assert torch.equal(together[1, 3:], alone[0])
    uncached = model.generate(ids, attention_mask=mask, use_cache=False, **settings)
    assert torch.equal(together, uncached)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["bert", "roberta", "llama_cls", "opt_350m", "gpt2_cls", "t5"])
def test_padding_on_the_right_changes_no_answer(kind: str, method: str) -> None:
    model, batch = prompted(kind, method), tiny_batch(kind)
    together = logits(model, batch)
    for row, count in enumerate(batch["attention_mask"].sum(1).tolist()):
        alone = {name: value[row : row + 1, :count] for name, value in batch.items() if value.dim() == 2}
        if kind == "t5":
            alone["labels"] = batch["labels"][row : row + 1]
        close("row", together[row : row + 1], logits(model, alone))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["llama_gqa", "t5_gated"])
def test_beams(kind: str, method: str) -> None:
    model = prompted(kind, method)
    ids = tiny_batch(kind, size=2, length=6)["input_ids"].clamp(min=1)
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False, "num_beams": 3}
    assert torch.equal(model.generate(ids, **settings), model.generate(ids, use_cache=False, **settings))


@pytest.mark.parametrize("name", ["BertForTokenClassification", "BertForQuestionAnswering", "LlamaForCausalLM"])
def test_the_head_answers_for_the_text_alone(name: str) -> None:
    import transformers

    kind = "bert" if name.startswith("Bert") else "llama_gqa"
    config = tiny_model(kind, num_labels=2).config
    model: Any = getattr(transformers, name)(config).double().eval()
    batch = {key: value for key, value in tiny_batch(kind).items() if key != "labels"}
    apt.patch_model(model, method="p_tuning", num_virtual_tokens=P)
    with torch.no_grad():
        output = model(**batch, output_hidden_states=True)
        pair = model(**batch, return_dict=False)
    first = output.start_logits if "Question" in name else output.logits
    assert first.shape[:2] == batch["input_ids"].shape
    assert torch.equal(pair[0], first)
    assert {states.shape[1] for states in output.hidden_states} == {batch["input_ids"].shape[1]}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["bert", "llama_gqa", "t5"])
def test_p_tuning_under_gradient_checkpointing(kind: str, reentrant: bool) -> None:
    grads = []
    for checkpointed in (False, True):
        model = prompted(kind, "p_tuning").train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(**tiny_batch(kind)).loss.backward()
        grads.append([parameter.grad for parameter in model.apt_prompt.parameters()])
    for mine, wanted in zip(*grads, strict=True):
        assert wanted.abs().max() > 0
        close("gradient", mine, wanted)


@pytest.mark.parametrize("kind", ["bert", "llama_gqa", "gpt2", "t5"])
def test_prefixes_and_gradient_checkpointing_exclude_each_other(kind: str) -> None:
    model = prompted(kind, "prefix_tuning")
    model.gradient_checkpointing_enable()
    logits(model, tiny_batch(kind))  # nothing is checkpointed in evaluation
    with pytest.raises(ValueError, match="gradient_checkpointing_disable"):
        model.train()(**tiny_batch(kind))


def test_dropout_acts_in_training_alone() -> None:
    for method in METHODS:
        model = prompted("bert", method, dropout_probability=0.5)
        batch = tiny_batch("bert")
        assert torch.equal(logits(model, batch), logits(model, batch))
        model.apt_prompt.train()
        assert not torch.equal(logits(model, batch), logits(model, batch))


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16(method: str) -> None:
    model = prompted("llama_gqa", method, torch.bfloat16).train()
    model(**tiny_batch("llama_gqa")).loss.backward()
    for parameter in model.apt_prompt.parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad.any()
    model.eval().generate(torch.tensor([[3, 4]]), max_new_tokens=3)
    for kind in ("bert", "t5"):
        with torch.autocast("cpu", torch.bfloat16):
            prompted(kind, method, torch.float32).train()(**tiny_batch(kind)).loss.backward()


def test_what_is_refused() -> None:
    def patch(kind: str, method: str = "prefix_tuning", **settings: Any) -> Any:
        return apt.patch_model(tiny_model(kind), method=method, **settings)

    for kind in ("distilbert", "deberta"):
        with pytest.raises(ValueError, match="takes none; use method='p_tuning'"):
            patch(kind)
        patch(kind, "p_tuning")(**tiny_batch(kind))
    for settings in ({"prune": True}, {"target_modules": ("q",)}):
        with pytest.raises(ValueError, match="has no adapters: leave out prune"):
            patch("bert", "p_tuning", **settings)
    with pytest.raises(ValueError, match="num_virtual_tokens must be at least 1"):
        patch("bert", num_virtual_tokens=0)
    with pytest.raises(ValueError, match="one setting"):
        patch("bert", num_virtual_tokens=3, prefix_length=3)
    for kind in ("bert", "roberta", "gpt2", "opt"):
        for method in METHODS:
            model, room = prompted(kind, method), 64 - (kind == "roberta") - P  # it counts from behind padding
            fits = torch.full((1, room), 3)
            assert logits(model, {"input_ids": fits}).isfinite().all()
            with pytest.raises(ValueError, match=f"cut the text to {room} tokens"):
                model(input_ids=torch.full((1, room + 1), 3))
    model = prompted("llama_gqa", "prefix_tuning")
    ids = torch.tensor([[3, 4, 5]])
    with pytest.raises(ValueError, match="static cache"):
        model.generate(ids, max_new_tokens=3, cache_implementation="static")
    with pytest.raises(ValueError, match=r"must be \[B, T\]"):
        model(input_ids=ids, attention_mask=torch.ones(1, 1, 3, 3))
    first = model.generate(ids, max_new_tokens=3, return_dict_in_generate=True)
    more = torch.cat([first.sequences, torch.full((1, 9), 7)], dim=1)
    with pytest.raises(ValueError, match="give it the new tokens alone"):
        model.generate(more, past_key_values=copy.deepcopy(first.past_key_values), max_new_tokens=3)
    held = first.past_key_values.get_seq_length() - P
    settings = {"attention_mask": torch.ones_like(more), "max_new_tokens": 3}
    again = model.generate(more[:, held:], past_key_values=first.past_key_values, **settings)
    assert torch.equal(again, model.generate(more, **settings)[:, held:])


def test_encoder_of_t5_alone() -> None:
    import transformers

    config = tiny_model("t5").config
    encoder: Any = transformers.T5EncoderModel(config).double().eval()
    with pytest.raises(ValueError, match="takes none"):
        apt.patch_model(encoder, method="prefix_tuning")
    apt.patch_model(encoder, method="p_tuning", num_virtual_tokens=P)
    assert encoder(torch.tensor([[3, 4, 5]])).last_hidden_state.shape[1] == 3


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_unpatching_gives_the_base_back(kind: str, method: str) -> None:
    plain, batch = tiny_model(kind), tiny_batch(kind)
    before = logits(plain, batch)
    model = prompted(kind, method)
    assert (logits(model, batch) - before).abs().max() > 1e-2
    with pytest.raises(ValueError, match="patched already"):
        apt.patch_model(model, method=method)
    twin = copy.deepcopy(model)
    with pytest.raises(ValueError, match="cannot be merged"):
        apt.unpatch_model(model, merge=True)
    kept = logits(model, batch)
    with torch.no_grad():
        for parameter in model.apt_prompt.parameters():
            parameter.add_(1.0)
    assert not torch.equal(logits(model, batch), kept)
    assert torch.equal(logits(twin, batch), kept)
    apt.unpatch_model(model)
    assert torch.equal(logits(model, batch), before)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert all(p.requires_grad for p in model.parameters())
