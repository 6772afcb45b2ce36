"""Adapters saved for PEFT, read by PEFT; adapters of PEFT as the start of a run. The logits say whether it is right."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from check import close
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_models import MODELS, fill_adapters, tiny_batch, tiny_model
from torch import Tensor, nn

import apt
from apt.export.peft_fields import more_than_lora
from apt.records import PrunePlan
from apt.surgery.prune import apply_prune_plan

KINDS = [name for name in ("bert", "distilbert", "llama_gqa", "qwen3", "opt", "t5", "gpt2", "phi3") if name in MODELS]


def logits(model: nn.Module, kind: str) -> Tensor:
    with torch.no_grad():
        return model(**tiny_batch(kind)).logits


def ours(kind: str, **settings: Any) -> Any:
    """A patched model in float32 with adapters of several ranks and a head that moved."""
    settings = {"rank": 3, "target_modules": ("q", "v", "down"), **settings}
    model = fill_adapters(apt.patch_model(tiny_model(kind, torch.float32), **settings))
    module = next(module for module in model.modules() if isinstance(module, apt.APTAdapter) and module.rank)
    module.increase_rank(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["apt", "lora"])
@pytest.mark.parametrize("compact", [False, True])
def test_peft_reads_what_we_saved(kind: str, method: str, compact: bool, tmp_path: Path) -> None:
    model = ours(kind, method=method)
    apt.save_adapter(model, tmp_path / "adapter", compact=compact)
    theirs = PeftModel.from_pretrained(tiny_model(kind, torch.float32), tmp_path / "adapter").eval()
    assert (logits(theirs, kind) - logits(model, kind)).abs().max() < 1e-4 * logits(model, kind).abs().max().clamp(
        min=1
    )
    assert (logits(theirs, kind) - logits(tiny_model(kind, torch.float32), kind)).abs().max() > 1e-2
    shapes = {
        tensor.shape[0]
        for key, tensor in load_file(tmp_path / "adapter" / "adapter_model.safetensors").items()
        if "lora_A" in key
    }
    joined = kind in ("gpt2", "phi3")  # q and v lie in one projection, with 3 + 3 or 5 + 3 ranks
    assert shapes == (({3, 6, 8} if joined else {3, 5}) if compact else {8})


@pytest.mark.parametrize("kind", KINDS)
def test_our_own_round_trip(kind: str, tmp_path: Path) -> None:
    model = ours(kind)
    apt.save_adapter(model, tmp_path / "adapter")
    again = apt.patch_model(tiny_model(kind, torch.float32), rank=2, scale=0.5, target_modules=("q", "v", "down"))
    apt.load_adapter(again, tmp_path / "adapter")
    assert torch.allclose(logits(again, kind), logits(model, kind), atol=1e-4, rtol=1e-4)
    # The zeros that pad a rank could never learn, so they are not taken over.
    assert apt.summary(again).ranks == apt.summary(model).ranks


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"layer.1.attention.self.query": 2}, "alpha_pattern": {"layer.1.attention.self.query": 7}},
    ],
)
def test_a_peft_folder_is_the_start_of_a_run(settings: dict[str, Any], tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["query", "value"], task_type="SEQ_CLS", **settings)
    theirs = get_peft_model(tiny_model("bert", torch.float32), config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    theirs.save_pretrained(tmp_path / "theirs")
    model = apt.patch_model(tiny_model("bert", torch.float32), target_modules=("q", "v"))
    apt.load_adapter(model, tmp_path / "theirs")
    assert torch.allclose(logits(model, "bert"), logits(theirs.eval(), "bert"), atol=1e-5, rtol=1e-5)
    # And it trains and prunes from there.
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    run = apt.Controller(model, optimizer, 20, target_sparsity=0.3, round_to=1)
    for step in range(20):
        run.loss(model(**tiny_batch("bert", seed=step))).backward()
        run.after_backward()
        optimizer.step()
        run.after_step()
        optimizer.zero_grad()
    assert apt.summary(model).sparsity >= 0.3


def test_an_adapter_on_a_fused_projection_goes_to_its_parts(tmp_path: Path) -> None:
    theirs = get_peft_model(tiny_model("gpt2", torch.float32), LoraConfig(r=4, lora_alpha=6, target_modules=["c_attn"]))
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    theirs.save_pretrained(tmp_path / "theirs")
    for method, targets in (("apt", ("q", "k", "v")), ("lora", ("c_attn",))):
        model = apt.patch_model(tiny_model("gpt2", torch.float32), method=method, target_modules=targets)
        apt.load_adapter(model, tmp_path / "theirs")
        assert torch.allclose(logits(model, "gpt2"), logits(theirs.eval(), "gpt2"), atol=1e-5, rtol=1e-5)
        assert set(apt.summary(model).ranks.values()) == {4}
    some = apt.patch_model(tiny_model("gpt2", torch.float32), target_modules=("q", "v"))
    with pytest.raises(ValueError, match=r"c_attn\.k, where .*; patch it with target_modules=\['k', 'q', 'v'\]"):
        apt.load_adapter(some, tmp_path / "theirs")


def test_target_modules_name_the_adapted_layers_and_no_other(tmp_path: Path) -> None:
    for targets, expected in (
        (("q", "v"), ["query", "value"]),
        (("down",), [f"{i}.output.dense" for i in range(3)]),  # "output.dense" would name the attention's too
        (("bert.encoder.layer.1.attention.self.query",), ["1.attention.self.query"]),
    ):
        model = apt.patch_model(tiny_model("bert", torch.float32), target_modules=targets)
        apt.save_adapter(model, tmp_path / "a", overwrite=True)
        assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["target_modules"] == expected


def pruned() -> nn.Module:
    model = ours("bert")
    kept = {"layers.0.neurons": list(range(8))}
    apply_prune_plan(model, PrunePlan(step=1, target_sparsity=0.1, kept=kept, round_to=8))
    return model


def test_a_pruned_model_is_no_lora_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"use apt\.export_model"):
        apt.save_adapter(pruned(), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_an_existing_folder_is_kept(tmp_path: Path) -> None:
    apt.save_adapter(ours("bert"), tmp_path / "a")
    with pytest.raises(ValueError, match="overwrite=True"):
        apt.save_adapter(ours("bert"), tmp_path / "a")


@pytest.mark.parametrize(
    ("settings", "targets", "words"),
    [
        ({"use_dora": True}, ("q",), "use_dora"),
        ({"bias": "all"}, ("q",), "bias"),
        ({"target_modules": ["query", "key"]}, ("q",), r"target_modules=\['key', 'query'\]"),
    ],
)
def test_what_cannot_be_a_start_is_refused(
    settings: dict[str, Any], targets: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    config = LoraConfig(**{"target_modules": ["query"], **settings})
    get_peft_model(tiny_model("bert", torch.float32), config).save_pretrained(tmp_path / "a")
    model = apt.patch_model(tiny_model("bert", torch.float32), target_modules=targets)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=words):
        apt.load_adapter(model, tmp_path / "a")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_another_models_adapter_changes_nothing(tmp_path: Path) -> None:
    apt.save_adapter(ours("bert"), tmp_path / "a")
    wider = tiny_model("bert", torch.float32, hidden_size=48, num_attention_heads=4)
    with pytest.raises(ValueError, match="maps 48 to 48 features"):
        apt.load_adapter(apt.patch_model(wider, target_modules=("q", "v", "down")), tmp_path / "a")
    with pytest.raises(ValueError, match=r"holds no adapter_config\.json"):
        apt.load_adapter(ours("bert"), tmp_path)


def theirs_filled(kind: str, **settings: Any) -> Any:
    """A PEFT LoRA of that model on q_proj and v_proj, where nothing else is said, with numbers in all that trains."""
    config = LoraConfig(r=4, lora_alpha=6, **{"target_modules": ["q_proj", "v_proj"], **settings})
    theirs = get_peft_model(tiny_model(kind, torch.float32), config)
    draw = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=draw))
    return theirs


MORE = {
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "alora": {"alora_invocation_tokens": [1, 2]},
    "tokens": {"trainable_token_indices": [3, 4]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "dora": {"use_dora": True},
    "bias of B": {"lora_bias": True},
    "bias": {"bias": "lora_only"},
    "layers": {"layer_replication": [[0, 2], [1, 3]]},
    "parameters": {"target_modules": [], "target_parameters": ["q_proj.weight"]},
}
WORDS = {"embedding": "lora_embedding_", "bias of B": "lora_bias=True", "bias": "bias='lora_only'"}


@pytest.mark.filterwarnings("ignore")  # PEFT warns of some
@pytest.mark.parametrize("name", MORE)
def test_what_is_more_than_a_plain_lora_is_refused_by_name(name: str, tmp_path: Path) -> None:
    theirs_filled("llama_gqa", **MORE[name]).save_pretrained(tmp_path / "theirs")
    model = apt.patch_model(tiny_model("llama_gqa", torch.float32), method="lora", target_modules=["q_proj", "v_proj"])
    before = logits(model, "llama_gqa")
    changed = next(key for key in MORE[name] if key != "target_modules" or name == "embedding")
    with pytest.raises(ValueError, match=rf"more than a plain LoRA \(.*{WORDS.get(name, changed)}.*merge it with PEFT"):
        apt.load_adapter(model, tmp_path / "theirs")
    assert torch.equal(logits(model, "llama_gqa"), before)


def test_a_setting_of_a_newer_peft_is_refused_unless_it_is_off() -> None:
    plain = LoraConfig().to_dict() | {"runtime_config": None}
    assert more_than_lora(plain) is None
    assert more_than_lora({**plain, "use_newest": False, "newest_config": None}) is None
    assert more_than_lora({**plain, "use_newest": True}) == "use_newest=True"
    assert more_than_lora({**plain, "peft_type": "LOHA"}) == "peft_type='LOHA'"


PLAIN: dict[str, tuple[str, dict[str, Any]]] = {
    "gaussian": ("llama", {"init_lora_weights": "gaussian"}),
    "orthogonal": ("llama", {"init_lora_weights": "orthogonal"}),
    "one layer": ("llama", {"layers_to_transform": [1]}),
    "lm_head": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "tied lm_head": ("llama_gqa", {"target_modules": ["q_proj", "lm_head"]}),
    "norms": ("llama", {"modules_to_save": ["input_layernorm", "model.norm"]}),
    "table": ("llama", {"modules_to_save": ["embed_tokens"]}),
    "tied table": ("llama_gqa", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
}


@pytest.mark.filterwarnings("ignore")  # PEFT warns of ties and of tables that it saves
@pytest.mark.parametrize("name", PLAIN)
def test_every_plain_lora_has_the_logits_of_peft(name: str, tmp_path: Path) -> None:
    kind, settings = PLAIN[name]
    theirs = theirs_filled(kind, **settings)
    theirs.save_pretrained(tmp_path / "theirs")
    targets = settings.get("target_modules", ["q_proj", "v_proj"])
    model = apt.patch_model(tiny_model(kind, torch.float32), method="lora", target_modules=targets)
    apt.load_adapter(model, tmp_path / "theirs")
    close("logits", logits(model, kind), logits(theirs.eval(), kind))


@pytest.mark.filterwarnings("ignore")  # PEFT warns of ties
@pytest.mark.parametrize("alone", ["embed_tokens", "lm_head"])
def test_half_a_tie_is_refused(alone: str, tmp_path: Path) -> None:
    """PEFT gives it a weight of its own, and in our model it has none."""
    theirs_filled("llama_gqa", modules_to_save=[alone]).save_pretrained(tmp_path / "theirs")
    model = apt.patch_model(tiny_model("llama_gqa", torch.float32), method="lora", target_modules=["q_proj", "v_proj"])
    with pytest.raises(ValueError, match=rf"gives .*{alone}\.weight a weight of its own, .*; untie the model first"):
        apt.load_adapter(model, tmp_path / "theirs")


BESIDE: dict[str, tuple[str, str, tuple[str, ...], list[str]]] = {
    "table": ("llama", "lora", ("embed_tokens.weight",), ["embed_tokens"]),
    "tied table": ("llama_gqa", "lora", ("embed_tokens.weight",), ["embed_tokens", "lm_head"]),
    "norms": ("llama", "apt", ("norm.weight",), ["input_layernorm", "norm", "post_attention_layernorm"]),
    "one norm": ("llama", "lora", ("1.input_layernorm.weight",), ["1.input_layernorm"]),
    "the last norm": ("llama", "lora", ("model.norm.weight",), ["model.norm"]),
    "biases of norms": ("bert", "apt", ("LayerNorm.bias",), ["LayerNorm", "classifier", "pooler"]),
    "a linear": ("llama", "apt", ("1.mlp.down_proj.weight",), ["1.mlp.down_proj"]),
    "a square Conv1D": ("gpt2", "apt", ("1.attn.c_proj.weight",), ["1.attn.c_proj"]),
}


@pytest.mark.filterwarnings("ignore")  # PEFT warns of ties
@pytest.mark.parametrize("name", BESIDE)
def test_what_trains_beside_the_adapters_is_saved(name: str, tmp_path: Path) -> None:
    """By a user who set it to train, as with the embeddings of new tokens; read by PEFT and by ours."""
    kind, method, endings, saved = BESIDE[name]
    targets = {"llama": "q_proj", "llama_gqa": "q_proj", "bert": "query", "gpt2": "c_attn"}[kind]
    model = fill_adapters(apt.patch_model(tiny_model(kind, torch.float32), method=method, target_modules=[targets]))
    for key, parameter in model.named_parameters(remove_duplicate=False):
        if key.endswith(endings):
            parameter.requires_grad_(True)
            with torch.no_grad():
                parameter.add_(0.2 * torch.randn(parameter.shape))
    apt.save_adapter(model, tmp_path / "a")
    assert json.loads((tmp_path / "a/adapter_config.json").read_text())["modules_to_save"] == saved
    theirs = PeftModel.from_pretrained(tiny_model(kind, torch.float32), tmp_path / "a").eval()
    close("PEFT", logits(theirs, kind), logits(model, kind))
    again = apt.patch_model(tiny_model(kind, torch.float32), method=method, target_modules=[targets])
    apt.load_adapter(again, tmp_path / "a")
    close("ours", logits(again, kind), logits(model, kind))


@pytest.mark.parametrize(
    ("kind", "targets", "trains", "words"),
    [
        ("opt", ["q_proj"], "0.self_attn.q_proj.bias", r"q_proj\.bias trains, and .*q_proj has an adapter too"),
        ("llama_gqa", ["lm_head"], "embed_tokens.weight", r"lm_head\.weight trains, and lm_head has an adapter too"),
    ],
)
def test_what_a_lora_folder_has_no_place_for_is_refused(
    kind: str, targets: list[str], trains: str, words: str, tmp_path: Path
) -> None:
    model = apt.patch_model(tiny_model(kind, torch.float32), method="lora", target_modules=targets)
    next(p for key, p in model.named_parameters() if key.endswith(trains)).requires_grad_(True)
    with pytest.raises(ValueError, match=f"save_adapter: .*{words}; .* use apt.export_model, or freeze"):
        apt.save_adapter(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_prompt_beside_adapters_is_no_lora_folder(tmp_path: Path) -> None:
    manager = apt.EfficientFineTuningManager(tiny_model("llama", torch.float32))
    manager.apply_lora(["q_proj"])
    manager.apply_ptuning(2)
    with pytest.raises(ValueError, match=r"has no place for the prompt of this model; use apt\.export_model"):
        apt.save_adapter(manager.model, tmp_path / "a")


@pytest.mark.filterwarnings("ignore")  # PEFT warns of tables that it saves
def test_the_table_of_a_vocabulary_that_grew_is_saved(tmp_path: Path) -> None:
    """It trains or not: its new rows are random, and nobody else has them."""
    tiny_model("llama", torch.float32).save_pretrained(tmp_path / "base")
    kind: Any = type(tiny_model("llama"))
    model = kind.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(66, mean_resizing=False)
    fill_adapters(apt.patch_model(model, method="lora", target_modules=["q_proj"]))
    apt.save_adapter(model, tmp_path / "a")
    base = kind.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(66, mean_resizing=False)
    theirs = PeftModel.from_pretrained(base, tmp_path / "a").eval()
    ids = torch.arange(50, 66)[None]
    with torch.no_grad():
        close("logits", theirs(ids).logits, model.eval()(ids).logits)
