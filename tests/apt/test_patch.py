"""Putting adapters and gates in, taking them out, and what may train in between."""

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from check import close
from tiny_models import CLASSIFIERS, MODELS, NAMES, fill_adapters, free_heads, random_plan, tiny_batch, tiny_model
from torch import Tensor, nn

import apt
import apt_kernels
from apt.families import FAMILIES, anatomy_of
from apt.layers import APTAdapter, adapted
from apt.layers.around import around_of
from apt.surgery.prune import apply_prune_plan

ENCODER = ("query", "value", "intermediate.dense")
T5_GATED = ("Attention.q", "Attention.v", "wi_0")
PLACES = {  # where adapters go by default; decoders: q_proj, v_proj
    "bert": ENCODER,
    "roberta": ENCODER,
    "deberta": ("query_proj", "value_proj", "intermediate.dense"),
    "distilbert": ("q_lin", "v_lin", "lin1"),
    "gpt2": ("c_attn.q", "c_attn.v"),
    "gpt2_cls": ("c_attn.q", "c_attn.v"),
    "phi3": ("qkv_proj.q", "qkv_proj.v"),
    "phi3_sliding": ("qkv_proj.q", "qkv_proj.v"),
    "t5": ("Attention.q", "Attention.v", "wi"),
    "t5_gated": T5_GATED,
    "mt5": T5_GATED,
}
T5_CALLS = {"t5": (7, 7), "t5_gated": (12, 2), "mt5": (12, 2)}  # adapted linears computed together, and alone


def logits(model: Any, name: str) -> Tensor:
    with torch.no_grad():
        return model(**tiny_batch(name)).logits


def trainable(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def ranked(model: nn.Module) -> list[str]:
    return [name for name, module in adapted(model) if module.rank]


def tower() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4, bias=False)))


@pytest.mark.parametrize("method", ["apt", "lora"])
@pytest.mark.parametrize("name", NAMES)
def test_fresh_adapters_are_the_base_model(name: str, method: str) -> None:
    model = tiny_model(name)
    before = logits(model, name)
    assert apt.patch_model(model, method=method) is model
    if name.startswith("gpt2"):  # its own layers multiply by the weight the other way round
        close("logits", logits(model, name), before)
    else:
        assert torch.equal(logits(model, name), before)
    fill_adapters(model)
    assert not torch.allclose(logits(model, name), before)


@pytest.mark.parametrize("name", NAMES)
def test_what_trains(name: str) -> None:
    """Adapters at the family's places, and task heads with their pooler in full; heads of language models stay."""
    model = apt.patch_model(tiny_model(name))
    places = PLACES.get(name.removesuffix("_mlm"), ("q_proj", "v_proj"))
    assert all(adapter.endswith(places) for adapter in ranked(model))
    in_t5 = 7 * 2 + 5 if name in T5_CALLS else 0  # 7 attentions, 5 FFNs
    assert len(ranked(model)) == (in_t5 or len(places) * MODELS[name].settings.get("num_hidden_layers", 3))
    factors = {f"{adapter}.{factor}" for adapter in ranked(model) for factor in ("lora_A", "lora_B")}
    heads = trainable(model) - factors
    assert trainable(model) > heads
    assert {head.rpartition(".")[0] for head in heads} == {
        "bert": {"classifier", "bert.pooler.dense"},
        "roberta": {"classifier.dense", "classifier.out_proj"},
        "deberta": {"classifier", "pooler.dense"},
        "distilbert": {"pre_classifier", "classifier"},
        "llama_cls": {"score"},
        "gpt2_cls": {"score"},
        "opt_350m": {"score"},
    }.get(name, set())
    assert bool(heads) == (name in CLASSIFIERS)
    apt_kernels.reset_calls()
    model(**tiny_batch(name)).loss.backward()
    layers = len(ranked(model)) // len(places)
    alone = {"masked_lora_linear": {"torch": layers}} if len(places) == 3 else {}  # up; q, k and v go together
    inputs = 2 if name == "deberta" else 1  # q and k read the relative positions too
    calls = {"masked_lora_linears": {"torch": inputs * layers}, **alone}
    if name in T5_CALLS:  # q of a cross-attention reads another tensor than k and v
        together, one = T5_CALLS[name]
        calls = {"masked_lora_linears": {"torch": together}, "masked_lora_linear": {"torch": one}}
    assert apt_kernels.calls() == calls  # and no gate
    assert {key for key, p in model.named_parameters() if p.grad is not None} == trainable(model)


def test_a_question_answering_head_trains() -> None:
    from transformers import BertForQuestionAnswering

    model = apt.patch_model(BertForQuestionAnswering(tiny_model("bert").config))
    assert {name for name in trainable(model) if "lora" not in name} == {"qa_outputs.weight", "qa_outputs.bias"}


@pytest.mark.parametrize(
    ("targets", "wanted"),
    [
        (["q", "down"], ["attention.self.query", "output.dense"]),
        (["self.key"], ["attention.self.key"]),
        (["attention.output.dense"], ["attention.output.dense"]),
        (["bert.encoder.layer.1.attention.self.value"], ["attention.self.value"]),
        (["query", "q"], ["attention.self.query"]),
    ],
    ids=["roles", "suffix", "longer suffix", "full name", "twice the same"],
)
@pytest.mark.parametrize("method", ["apt", "lora"])
def test_targets(method: str, targets: list[str], wanted: list[str]) -> None:
    model = apt.patch_model(tiny_model("bert"), method=method, target_modules=targets)
    layers = [1] if targets[0].startswith("bert") else [0, 1, 2]
    assert sorted(ranked(model)) == sorted(f"bert.encoder.layer.{i}.{name}" for i in layers for name in wanted)
    assert {m.rank for _, m in adapted(model)} <= {0, 8}
    if method == "lora":
        assert ranked(model) == [name for name, _ in adapted(model)]  # nothing else is touched


@pytest.mark.parametrize(("name", "full"), [("bert", "bert.pooler.dense"), ("roberta", "classifier.dense")])
@pytest.mark.parametrize("method", ["apt", "lora"])
def test_an_ending_that_also_fits_the_head_leaves_the_head_whole(method: str, name: str, full: str) -> None:
    """As the docstring says: pooler and head are trained in full, so they get no adapter."""
    model = apt.patch_model(tiny_model(name), method=method, target_modules=["dense"])
    assert full not in dict(adapted(model))
    assert f"{full}.weight" in trainable(model)
    model(**tiny_batch(name)).loss.backward()


def test_an_unknown_architecture() -> None:
    """The first GPT: linears of the transposed kind, which get adapters but cannot be pruned."""
    from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

    torch.manual_seed(1)
    model = OpenAIGPTLMHeadModel(OpenAIGPTConfig(n_embd=8, n_layer=1, n_head=2, vocab_size=10)).eval()
    known = ", ".join(sorted({name for family in FAMILIES for name in family.model_types}))
    words = f"model_type 'openai-gpt' cannot be pruned; known are {known}; to add one, write"
    with pytest.raises(ValueError, match=words) as caught:
        apt.patch_model(model)
    assert "\n" not in str(caught.value)
    assert "method='lora' with target_modules" in str(caught.value)
    with pytest.raises(ValueError, match=r"'q' matches no linear layer; there are transformer\.h\.0\.attn\.c_attn, "):
        apt.patch_model(model, method="lora", target_modules=["q"])
    apt.patch_model(model, method="lora", target_modules=["c_attn", "c_proj"])
    assert ranked(model) == [f"transformer.h.0.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_proj")]
    model(torch.arange(10)[None], labels=torch.arange(10)[None]).loss.backward()
    assert {key for key, p in model.named_parameters() if p.grad is not None} == trainable(model)
    with pytest.raises(ValueError, match="model_type None cannot be pruned"):
        apt.patch_model(tower())
    with pytest.raises(ValueError, match="'q' matches no linear layer; this model has none"):
        apt.patch_model(nn.Sequential(nn.Tanh()), method="lora", target_modules=["q"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"target_modules": ["q", "qurey"]}, r"target_modules entry 'qurey' matches no linear layer; there are bert\."),
        ({"target_modules": ["gate"]}, "target_modules entry 'gate' matches no linear layer"),
        ({"target_modules": ["uery"]}, "target_modules entry 'uery' matches no linear layer"),
        ({"rang": 4}, "unknown setting 'rang'; did you mean rank"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"method": "lara"}, r"method must be one of \['apt', 'lora', .*\], got 'lara'"),
        ({"target_modules": []}, "target_modules is empty; name linear layers"),
        ({"momentum_salience": 1.0}, r"momentum_salience must be in \[0, 1\), got 1.0"),
        ({"mu_ramp": "steep"}, r"mu_ramp must be one of \['window', 'distill'\], got 'steep'"),
        ({"distill_every": 0}, "distill_every must be at least 1, got 0"),
        ({"distill_loss_weight_end": 1.1}, r"distill_loss_weight_end must be in \[0, 1\], got 1.1"),
        ({"target_sparsity": 1.2}, r"target_sparsity must be in \[0, 1\), got 1.2"),
    ],
)
def test_settings_that_cannot_be_leave_the_model_as_it_was(settings: dict[str, Any], words: str) -> None:
    model = tiny_model("bert")
    with pytest.raises(ValueError, match=words):
        apt.patch_model(model, **settings)
    assert not list(adapted(model))
    assert all(p.requires_grad for p in model.parameters())
    apt.patch_model(model)


def test_a_model_without_layers_has_no_prunable_units() -> None:
    with pytest.raises(ValueError, match="no layers, so it has no prunable units"):
        apt.patch_model(tiny_model("bert", num_hidden_layers=0))


def test_cross_attention_is_refused() -> None:
    from transformers import BertLMHeadModel

    config = copy.deepcopy(tiny_model("bert_mlm").config)
    config.is_decoder = config.add_cross_attention = True
    with pytest.raises(ValueError, match="bert with cross-attention cannot be pruned; use method='lora'"):
        apt.patch_model(BertLMHeadModel(config))


def test_positions_with_projections_of_their_own_are_refused() -> None:
    model = tiny_model("deberta", share_att_key=False)
    with pytest.raises(ValueError, match=r"share_att_key=False cannot be pruned, .*; use method='lora'"):
        apt.patch_model(model)
    apt.patch_model(model, method="lora", target_modules=["query_proj", "value_proj"])
    model(**tiny_batch("deberta")).loss.backward()


def test_patched_twice() -> None:
    model = apt.patch_model(tiny_model("bert"))
    before = trainable(model)
    with pytest.raises(ValueError, match=r"patched already; call apt\.unpatch_model\(model\) first"):
        apt.patch_model(model, method="lora")
    assert trainable(model) == before
    apt.patch_model(apt.unpatch_model(model))


def test_lora_on_any_module() -> None:
    model = tower()
    x = torch.randn(5, 8)
    before = model(x)
    assert apt.patch_model(model, method="lora", target_modules=["0", "2.1"], rank=2) is model
    assert ranked(model) == ["0", "2.0", "2.1"]  # "0" is the name of one and the ending of another
    assert torch.equal(model(x), before)
    model(x).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trainable(model)
    assert all("lora" in name for name in trainable(model))


@pytest.mark.parametrize("target", ["self_attn.out_proj", "linear1"])
def test_a_linear_that_torch_reads_past_is_refused_or_heard(target: str) -> None:
    """nn.MultiheadAttention and the fast path of nn.TransformerEncoderLayer take weights without calling the linear."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    refused = ""
    try:
        apt.patch_model(layer, method="lora", target_modules=[target])
    except ValueError as error:
        refused = str(error)
    if refused:
        assert target in refused
        return
    fill_adapters(layer)
    x = torch.randn(2, 3, 8)
    layer(x).sum().backward()
    assert all(p.grad is not None and p.grad.any() for name, p in layer.named_parameters() if "lora" in name)
    trained = layer(x).detach()
    with torch.no_grad():
        close("inference", layer.eval()(x), trained)


@pytest.mark.parametrize("method", ["apt", "lora"])
@pytest.mark.parametrize("name", NAMES)
def test_unpatching_restores_everything(name: str, method: str) -> None:
    model = tiny_model(name)
    frozen = next(model.parameters()).requires_grad_(False)
    before, kinds = copy.deepcopy(model.state_dict()), [type(module) for module in model.modules()]
    grads = {key: p.requires_grad for key, p in model.named_parameters()}
    fill_adapters(apt.patch_model(model, method=method))
    assert apt.unpatch_model(model) is model
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert [type(module) for module in model.modules()] == kinds
    assert {key: p.requires_grad for key, p in model.named_parameters()} == grads
    assert next(model.parameters()) is frozen
    assert not model._forward_pre_hooks
    with pytest.raises(ValueError, match="not patched"):
        apt.unpatch_model(model)


@pytest.mark.parametrize("shrunk", [False, True], ids=["whole", "shrunk"])
@pytest.mark.parametrize("name", NAMES)
def test_unpatching_with_the_adapters_merged_keeps_the_outputs(name: str, shrunk: bool) -> None:
    model = fill_adapters(apt.patch_model(tiny_model(name), rank=3))
    if shrunk:
        neurons = next(group for group in apt.summary(model).units if group.endswith("neurons"))
        apply_prune_plan(model, random_plan(model, empty=[free_heads(model)[-1], neurons], seed=1))
    before = logits(model, name)
    apt.unpatch_model(model, merge=True)
    assert not any(isinstance(module, APTAdapter) for module in model.modules())
    close("logits", logits(model, name), before)


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
@pytest.mark.parametrize("name", ["bert", "llama_gqa"])
def test_lora_equals_peft(name: str) -> None:
    from peft import LoraConfig, get_peft_model

    ours = fill_adapters(apt.patch_model(tiny_model(name), method="lora", target_modules=["q", "v"], rank=4, scale=2.0))
    places = ["query", "value"] if name == "bert" else ["q_proj", "v_proj"]
    settings = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": places}
    theirs = get_peft_model(tiny_model(name), LoraConfig(**settings))
    pairs = []
    for place, module in adapted(ours):
        layer = theirs.base_model.model.get_submodule(place)
        for mine, other in ((module.lora_A, layer.lora_A["default"]), (module.lora_B, layer.lora_B["default"])):
            other.weight.data = mine.data.clone()
            pairs.append((place, mine, other.weight))
    batch = tiny_batch(name)
    outputs = [model(**batch) for model in (ours, theirs)]
    close("logits", outputs[0].logits, outputs[1].logits)
    for output in outputs:
        output.loss.backward()
    assert len(pairs) == 12
    for place, mine, other in pairs:
        close(place, mine.grad, other.grad)


def test_summary_counts() -> None:
    name, rank = "llama_gqa", 3
    model = tiny_model(name)
    whole = sum(p.numel() for p in model.parameters())
    apt.patch_model(model, rank=rank)
    fresh = apt.summary(model)
    assert (fresh.sparsity, fresh.params_before, fresh.params_after, fresh.masked) == (0.0, whole, whole, 0)
    assert (fresh.heads, fresh.neurons) == ([4, 4, 4], [40, 40, 40])
    assert fresh.trainable_params == 3 * rank * ((32 + 32) + (32 + 16))
    assert fresh.ranks == {f"model.layers.{i}.self_attn.{p}_proj": rank for i in range(3) for p in "qv"}
    plan = random_plan(model, empty=["layers.2.heads"], seed=1)
    kept = {key: len(positions) for key, positions in plan.kept.items()}
    for keep_tail in (True, False):
        twin = copy.deepcopy(model)
        apply_prune_plan(twin, plan, keep_tail=keep_tail)
        small = apt.summary(twin)
        assert small.heads == [kept[f"layers.{i}.heads"] for i in range(3)]
        assert small.neurons == [kept[f"layers.{i}.neurons"] for i in range(3)]
        gone = (12 - sum(small.heads)) * 32 * 24 + (120 - sum(small.neurons)) * 96
        assert small.params_after == whole - gone
        assert small.sparsity == pytest.approx(gone / (3 * (4 * 32 * 24 + 40 * 96 + 2 * 32)))
    assert f"{small.params_after:,} of {whole:,}" in str(small)
    assert "6 adapters" in str(fresh)


def test_a_copy_is_a_model_of_its_own() -> None:
    model = fill_adapters(apt.patch_model(tiny_model("bert")))
    twin = copy.deepcopy(model)
    close("logits", logits(twin, "bert"), logits(model, "bert"))
    before = logits(model, "bert")
    apply_prune_plan(twin, random_plan(twin, seed=1))
    apt.unpatch_model(twin, merge=True)
    assert around_of(twin) is None
    assert len(model.apt_around.wrappers) == 1
    assert torch.equal(logits(model, "bert"), before)


@pytest.mark.parametrize("method", ["lora", "apt", "adalora", "dynacsg", "prefix_tuning"])
@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_the_last_reference_frees_the_model(name: str, method: str) -> None:
    """At once, with every part of it: one in a cycle waits for the collector, with all its memory."""
    tiny_model(name)(**tiny_batch(name))  # what transformers keeps of a first call is not asked here
    gc.collect()
    gc.disable()
    try:
        model = apt.patch_model(tiny_model(name), method=method)
        model(**tiny_batch(name)).loss.backward()
        if method == "apt":
            apply_prune_plan(model, random_plan(model, empty=free_heads(model)[-1:], seed=1))
            assert apt.summary(model).sparsity > 0.0
            model(**tiny_batch(name)).loss.backward()
        there = {path: weakref.ref(module) for path, module in model.named_modules()}
        copied = copy.deepcopy(model)
        del model
        assert [path for path, module in there.items() if module() is not None] == []
        copied(**tiny_batch(name))
        assert anatomy_of(copied).model is copied
        read = pickle.loads(pickle.dumps(copied))
        assert torch.equal(read(**tiny_batch(name)).logits, copied(**tiny_batch(name)).logits)
    finally:
        gc.enable()
