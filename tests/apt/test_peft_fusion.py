"""A PEFT LoRA model on the fused op: the same numbers, and everything of PEFT still there."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import MODELS, tiny_batch, tiny_model
from torch import nn

import apt
import apt_kernels
from apt.surgery.peft_layers import FusedLoraLinear

KINDS = [name for name in ("bert", "llama", "qwen2", "t5") if name in MODELS]


def lora(kind: str, dtype: torch.dtype = torch.float64, names: tuple[str, ...] = ("default",), **settings: Any) -> Any:
    """A tiny model with PEFT's LoRA on every linear of its layers; its adapters are not zero."""
    torch.manual_seed(0)
    config = LoraConfig(**{"r": 5, "lora_alpha": 3, "target_modules": "all-linear", **settings})
    model = get_peft_model(tiny_model(kind, dtype), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return model


def pair(kind: str, dtype: torch.dtype = torch.float64, **settings: Any) -> tuple[Any, Any]:
    """PEFT's model, and a patched copy of it."""
    theirs = lora(kind, dtype, **settings)
    return theirs, apt.patch_model(copy.deepcopy(theirs))


def ran() -> int:
    return sum(apt_kernels.calls().get("masked_lora_linear", {}).values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-11), (torch.float32, 1e-6)])
def test_logits_and_gradients_are_pefts(kind: str, dtype: torch.dtype, close: float) -> None:
    theirs, ours = pair(kind, dtype)
    batch = tiny_batch(kind)
    results = []
    apt_kernels.reset_calls()
    for model in (theirs, ours):
        output = model.train()(**batch)
        output.loss.backward()
        results.append((output.logits, {name: p.grad for name, p in model.named_parameters()}))
    layers = sum(isinstance(module, FusedLoraLinear) for module in ours.modules())
    assert ran() == layers > 0
    (logits, grads), (mine, my_grads) = results
    assert (mine - logits).abs().max() <= close * max(1.0, logits.abs().max().item())
    assert grads.keys() == my_grads.keys()
    for name, grad in grads.items():
        assert (grad is None) == (my_grads[name] is None), name
        if grad is not None:
            assert (my_grads[name] - grad).abs().max() <= close * max(1.0, grad.abs().max().item()), name


@pytest.mark.parametrize("kind", KINDS)
def test_twenty_steps_have_pefts_losses(kind: str) -> None:
    models = pair(kind, torch.float32)
    losses: list[list[float]] = [[], []]
    for model, own in zip(models, losses, strict=True):
        optimizer = torch.optim.AdamW([p for p in model.train().parameters() if p.requires_grad], lr=1e-3)
        for step in range(20):
            loss = model(**tiny_batch(kind, seed=step)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            own.append(loss.item())
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) <= 1e-5
    assert losses[0][0] != losses[0][-1]


def test_everything_of_peft_works_as_before(tmp_path: Path) -> None:
    theirs, ours = pair("llama", names=("default", "second"))
    batch = tiny_batch("llama")

    def same(exact: bool = False) -> None:
        with torch.no_grad():
            a, b = theirs(**batch).logits, ours(**batch).logits
        assert torch.equal(a, b) if exact else (a - b).abs().max() < 1e-9

    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    same()
    with theirs.disable_adapter(), ours.disable_adapter():
        same(exact=True)
    for model in (theirs, ours):
        model.set_adapter("second")
    same()
    for model in (theirs, ours):
        model.merge_adapter()
    same(exact=True)
    for model in (theirs, ours):
        model.unmerge_adapter()
    same()
    for model, name in ((theirs, "theirs"), (ours, "ours")):
        model.save_pretrained(tmp_path / name)
    for file in ("adapter_model.safetensors", "second/adapter_model.safetensors"):
        assert (tmp_path / "theirs" / file).read_bytes() == (tmp_path / "ours" / file).read_bytes()
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "ours")
    for model in (theirs, ours):
        model.set_adapter("default")
    with torch.no_grad():
        assert (loaded(**batch).logits - theirs(**batch).logits).abs().max() < 1e-9
    names = ["default", "second", "__base__", "default"]
    with torch.no_grad():
        mixed = [model.eval()(**batch, adapter_names=names).logits for model in (theirs, ours)]
    assert torch.equal(*mixed)
    ids = batch["input_ids"][:, :4]
    generated = [model.generate(input_ids=ids, max_new_tokens=5, do_sample=False) for model in (theirs, ours)]
    assert torch.equal(*generated)
    theirs, ours = theirs.merge_and_unload(), ours.merge_and_unload()
    same(exact=True)
    assert not any("peft" in type(module).__module__ for module in ours.modules())


def test_two_active_adapters_stay_on_pefts_path() -> None:
    theirs, ours = pair("bert", names=("default", "second"))
    for model in (theirs, ours):
        model.base_model.set_adapter(["default", "second"])
    apt_kernels.reset_calls()
    with torch.no_grad():
        assert torch.equal(theirs(**tiny_batch("bert")).logits, ours(**tiny_batch("bert")).logits)
    assert ran() == 0


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    _, plain = pair("llama")
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    checkpointed.enable_input_require_grads()
    for model in (plain, checkpointed):
        model.train()(**tiny_batch("llama")).loss.backward()
    for (name, p), q in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or torch.equal(p.grad, q.grad), name


def test_a_16_bit_base_stays_near_peft() -> None:
    theirs, ours = pair("llama", torch.bfloat16)
    assert next(p for n, p in ours.named_parameters() if "lora_A" in n).dtype == torch.float32
    truth = copy.deepcopy(theirs).double()
    batch = tiny_batch("llama")
    with torch.no_grad():
        exact, a, b = (model(**batch).logits.double() for model in (truth, theirs, ours))
    assert (b - exact).abs().max() <= 1.5 * (a - exact).abs().max()


@pytest.mark.parametrize(
    ("settings", "words", "fused_in_training"),
    [
        ({"use_dora": True, "target_modules": ["query", "value"]}, "6 Dora adapters", 0),
        ({"lora_dropout": 0.5, "target_modules": ["query", "value"]}, "6 layers with lora_dropout while they train", 0),
        ({"target_modules": ["query", "word_embeddings"]}, "1 Embedding layers", 3),
        ({"lora_bias": True, "target_modules": ["query"], "init_lora_weights": True}, "3 adapters with a bias", 0),
        ({"bias": "all", "target_modules": ["query"]}, "3 layers whose base trains", 0),
    ],
)
def test_what_the_op_cannot_express_stays_and_is_said(
    settings: dict[str, Any], words: str, fused_in_training: int
) -> None:
    theirs = lora("bert", **settings)
    ours = copy.deepcopy(theirs)
    with pytest.warns(UserWarning, match=words):
        apt.patch_model(ours)
    for training in (False, True):
        apt_kernels.reset_calls()
        torch.manual_seed(3)
        expected = theirs.train(training)(**tiny_batch("bert")).logits
        torch.manual_seed(3)
        found = ours.train(training)(**tiny_batch("bert")).logits
        assert (found - expected).abs().max() < 1e-10
        if training:
            assert ran() == fused_in_training
    assert "lora_dropout" not in settings or _evaluated_calls(ours) == 6  # without dropout the op serves


def _evaluated_calls(model: nn.Module) -> int:
    apt_kernels.reset_calls()
    model.eval()(**tiny_batch("bert"))
    return ran()


def test_hooks_inside_a_layer_are_still_called() -> None:
    _, ours = pair("bert")
    layer = next(module for module in ours.modules() if isinstance(module, FusedLoraLinear))
    seen = []
    layer.get_base_layer().register_forward_hook(lambda *_: seen.append(1))
    ours(**tiny_batch("bert"))
    assert seen == [1]


def test_unpatch_gives_pefts_forward_back() -> None:
    theirs, ours = pair("bert")
    assert apt.unpatch_model(ours) is ours
    assert [type(module) for module in ours.modules()] == [type(module) for module in theirs.modules()]
    apt_kernels.reset_calls()
    with torch.no_grad():
        assert torch.equal(theirs(**tiny_batch("bert")).logits, ours(**tiny_batch("bert")).logits)
    assert ran() == 0


def _embeddings_only() -> nn.Module:
    return get_peft_model(tiny_model("bert"), LoraConfig(target_modules=["word_embeddings"]))


def _other_method() -> nn.Module:
    from peft import IA3Config

    return get_peft_model(tiny_model("bert"), IA3Config(target_modules=["key"], feedforward_modules=[]))


@pytest.mark.parametrize(
    ("build", "settings", "words"),
    [
        (lambda: apt.patch_model(lora("bert")), {}, "patched already"),
        (lambda: lora("bert"), {"rank": 4}, "keeps PEFT's settings"),
        (_embeddings_only, {}, "none of PEFT's layers can be fused: 1 Embedding layers"),
        (_other_method, {}, "only LoRA runs on the fused op"),
    ],
)
def test_refusals_say_what_to_do(build: Callable[[], nn.Module], settings: dict[str, Any], words: str) -> None:
    model = build()
    with pytest.raises(ValueError, match=words):
        apt.patch_model(model, **settings)


def test_no_warning_where_everything_is_fused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = apt.patch_model(lora("llama"))
    theirs = [name for name, _ in model.named_modules() if name.endswith(".lora_A")]
    assert len(theirs) == sum(isinstance(module, FusedLoraLinear) for module in model.modules()) > 0


def test_layers_are_called_as_peft_calls_them() -> None:
    theirs, ours = pair("llama")
    assert repr(ours) == repr(theirs)
    assert [vars(layer) for layer in ours.get_layer_status()] == [vars(layer) for layer in theirs.get_layer_status()]
    assert {layer.module_type for layer in ours.get_layer_status()} == {"lora.Linear"}
