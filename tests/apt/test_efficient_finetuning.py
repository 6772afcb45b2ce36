"""The manager: several methods on one model, shared parameters, and weights that fit their own model only."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from check import Unrounded, close
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import tiny_batch, tiny_model
from torch import Tensor, nn

import apt
from apt.efficient_finetuning import (
    EfficientFineTuningManager,
    LoRALayer,
    LoRALinear,
    apply_adalora_to_model,
    apply_lora_to_model,
    apply_prefix_tuning_to_model,
    apply_ptuning_to_model,
)
from apt.layers import APTAdapter

BERT = "bert.encoder.layer"


def logits(model: Any, kind: str = "bert") -> Tensor:
    with torch.no_grad(), Unrounded():
        return model(**tiny_batch(kind)).logits  # type: ignore[no-any-return]


def everything(kind: str = "bert", prompt: str = "ptuning") -> Any:
    """A manager of a model with LoRA, AdaLoRA's simple form and a prompt, all away from their start."""
    manager = apply_lora_to_model(tiny_model(kind), ["q", "v"], rank=3)
    manager.apply_adalora(["v", "o"], rank=2)
    if prompt == "ptuning":
        manager.apply_ptuning(4, hidden_dimension=10)
    else:
        manager.apply_prefix_tuning(prefix_length=4)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in manager.get_trainable_parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
    return manager


@pytest.mark.parametrize(("kind", "prompt"), [("bert", "ptuning"), ("llama_gqa", "ptuning"), ("llama_gqa", "prefix")])
def test_methods_follow_each_other(kind: str, prompt: str) -> None:
    manager = everything(kind, prompt)
    model = manager.model
    assert len(manager.lora_layers) == 6
    assert len(manager.adalora_layers) == 6
    assert set(manager.lora_layers) != set(manager.adalora_layers)
    assert (manager.ptuning_embeddings if prompt == "ptuning" else manager.prefix_tuning) is not None
    model.train()(**tiny_batch(kind)).loss.backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    full = logits(model.eval(), kind)
    plain = tiny_model(kind)
    for parts in ("lora_layers", "adalora_layers"):
        other = copy.deepcopy(manager)
        with torch.no_grad():
            for layer in getattr(other, parts).values():
                layer.lora_B.zero_()
        assert (logits(other.model, kind) - full).abs().max() > 1e-4, parts
    back = apt.unpatch_model(model)
    for parameter, old in zip(back.state_dict().items(), plain.state_dict().items(), strict=True):
        assert parameter[0] == old[0]
    if kind != "bert":  # whose head was moved
        close("unpatched", logits(back, kind), logits(plain, kind))


def test_adapters_of_two_methods_merge() -> None:
    manager = apply_lora_to_model(tiny_model("bert"), ["q", "v"], rank=3)
    manager.apply_adalora(["v", "o"], rank=2)
    for layer in (*manager.lora_layers.values(), *manager.adalora_layers.values()):
        nn.init.normal_(layer.lora_B)
    before = logits(manager.model)
    close("merged", logits(apt.unpatch_model(manager.model, merge=True)), before)


def test_a_second_prompt_is_refused() -> None:
    manager = apply_ptuning_to_model(tiny_model("bert"), 3)
    manager.apply_lora(["q"])
    with pytest.raises(ValueError, match="has a prompt already, so p_tuning cannot be added"):
        manager.apply_ptuning(3)


def test_methods_of_their_own_are_refused() -> None:
    model = apt.patch_model(tiny_model("bert"), method="adalora", rank=2)
    with pytest.raises(ValueError, match="patched with method 'adalora', which goes with no other"):
        EfficientFineTuningManager(model).apply_lora(["q"])


def test_sizes_are_found_or_compared() -> None:
    manager = apply_prefix_tuning_to_model(tiny_model("llama_gqa"), 3, 4, 4, prefix_length=5)
    assert manager.prefix_tuning is not None
    assert manager.prefix_tuning.num_heads == [4, 4, 4]
    model = tiny_model("llama_gqa")
    with pytest.raises(ValueError, match="apply_prefix_tuning: num_heads is 4 in this model, not 8"):
        apply_prefix_tuning_to_model(model, 3, 8, 4)
    with pytest.raises(ValueError, match="apply_ptuning: embedding_dimension is 32 in this model, not 768"):
        apply_ptuning_to_model(model, embedding_dimension=768)
    assert not hasattr(model, "_apt")  # nothing was put in
    with pytest.raises(ValueError, match=r"no nn\.Embedding; give embedding_dimension"):
        apply_ptuning_to_model(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="unknown; give all of"):
        apply_prefix_tuning_to_model(nn.Linear(3, 3), num_layers=2)


def test_a_module_without_family_holds_its_prompt() -> None:
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 6))
    manager = apply_ptuning_to_model(model, 3, hidden_dimension=4)
    manager.apply_lora(["1"], rank=2)
    found = {name.partition(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert found == {"1", "apt_ptuning_embeddings"}
    with pytest.raises(ValueError, match="has a PTuningEmbedding already"):
        manager.apply_ptuning(3)


def test_layers_share_parameters() -> None:
    own, shared = (
        apply_lora_to_model(tiny_model("bert"), ["q", "v"], rank=2, dropout_probability=0.0, share_parameters=s)
        for s in (False, True)
    )
    head = sum(p.numel() for n, p in own.model.named_parameters() if p.requires_grad and "lora" not in n)
    assert own.count_trainable_parameters() == head + 6 * 2 * (32 + 32)
    assert shared.count_trainable_parameters() == head + 2 * (32 + 32)
    a = [layer.lora_A for layer in shared.lora_layers.values()]
    assert len(a) == 6
    nn.init.normal_(next(iter(shared.lora_layers.values())).lora_B)
    with torch.no_grad():
        for mine, other in zip(own.lora_layers.values(), shared.lora_layers.values(), strict=True):
            mine.lora_A.copy_(other.lora_A)
            mine.lora_B.copy_(other.lora_B)
    for manager in (own, shared):
        manager.model.train()(**tiny_batch("bert")).loss.backward()
    summed = sum(layer.lora_A.grad for layer in own.lora_layers.values())
    close("gradient", a[0].grad, summed)


def test_saved_weights_come_back(tmp_path: Path) -> None:
    manager = everything()
    path = manager.save_efficient_weights(tmp_path / "new" / "weights.pt")
    assert [file.name for file in path.parent.iterdir()] == ["weights.pt"]
    with safe_open(path, "pt") as file:
        stored = {key for key in file.keys() if not key.startswith("base::")}  # noqa: SIM118
    assert stored == {name for name, p in manager.model.named_parameters() if p.requires_grad}
    other = everything()
    with torch.no_grad():
        for parameter in other.get_trainable_parameters():
            parameter.zero_()
    other.load_efficient_weights(path)
    assert torch.equal(logits(other.model), logits(manager.model))


def test_the_same_model_in_another_precision_takes_them(tmp_path: Path) -> None:
    saved = apply_lora_to_model(tiny_model("bert", torch.float32), ["q"])
    path = saved.save_efficient_weights(tmp_path / "w")
    manager = apply_lora_to_model(tiny_model("bert", torch.bfloat16), ["q"])
    manager.load_efficient_weights(path)
    pairs = list(zip(manager.get_trainable_parameters(), saved.get_trainable_parameters(), strict=True))
    assert pairs
    assert all(torch.equal(mine, theirs.to(mine.dtype)) for mine, theirs in pairs)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("rank", rf"{BERT}\.0\.attention\.self\.query\.lora_A is \[8, 32\] there and \[4, 32\] here"),
        ("targets", rf"{BERT}\.0\.attention\.self\.value\.lora_A, trained in this model, is not trained there"),
        ("method", rf"{BERT}\.0\.attention\.self\.query\.lora_A, trained there, is not trained in this model"),
        ("layers", rf"{BERT}\.2\.attention\.self\.query\.weight, frozen there, is not frozen in this model"),
        ("width", r"bert\.embeddings\.word_embeddings\.weight is \[60, 32\] there and \[60, 64\] here"),
        ("numbers", rf"the frozen {BERT}\.1\.output\.dense\.weight has other numbers"),
    ],
)
def test_weights_of_another_model_are_refused(change: str, reason: str, tmp_path: Path) -> None:
    path = apply_lora_to_model(tiny_model("bert"), ["q"]).save_efficient_weights(tmp_path / "weights.safetensors")
    sizes = {"layers": {"num_hidden_layers": 2}, "width": {"hidden_size": 64}}.get(change, {})
    model = tiny_model("bert", **sizes)
    if change == "numbers":
        with torch.no_grad():
            model.bert.encoder.layer[1].output.dense.weight.add_(1e-3)
    if change == "method":
        manager = apply_adalora_to_model(model, ["q"])
    else:
        manager = apply_lora_to_model(model, ["q", "v"] if change == "targets" else ["q"], 4 if change == "rank" else 8)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=reason):
        manager.load_efficient_weights(path)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_other_files_are_refused(tmp_path: Path) -> None:
    manager = apply_lora_to_model(tiny_model("bert"), ["q"])
    torch.save({"a": torch.ones(2)}, tmp_path / "pickled.pt")
    with pytest.raises(ValueError, match="no safetensors file"):
        manager.load_efficient_weights(tmp_path / "pickled.pt")
    save_file({"a": torch.ones(2)}, tmp_path / "others.safetensors")
    with pytest.raises(ValueError, match="was not written by save_efficient_weights"):
        manager.load_efficient_weights(tmp_path / "others.safetensors")
    with pytest.raises(ValueError, match="nothing in this model trains"):
        EfficientFineTuningManager(nn.Linear(2, 2).requires_grad_(False)).save_efficient_weights(tmp_path / "x")


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = apply_lora_to_model(tiny_model("bert"), ["q"])
    path = manager.save_efficient_weights(tmp_path / "weights")
    old = load_file(path)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    nn.init.ones_(next(iter(manager.lora_layers.values())).lora_B)
    with pytest.raises(KeyboardInterrupt):
        manager.save_efficient_weights(path)
    assert all(torch.equal(tensor, old[name]) for name, tensor in load_file(path).items())


def test_a_bias_of_the_update_trains() -> None:
    linear = LoRALinear(nn.Linear(4, 3), rank=2, bias=True)
    trained = {name for name, p in linear.named_parameters() if p.requires_grad}
    assert trained == {"lora_layer.lora_A", "lora_layer.lora_B", "lora_layer.bias"}
    nn.init.constant_(linear.lora_layer.bias, 0.5)  # type: ignore[arg-type]
    x = torch.randn(5, 4)
    close("bias", linear(x), linear.original_layer(x) + 0.5)
    linear(x).sum().backward()
    assert linear.lora_layer.bias is not None
    assert torch.equal(linear.lora_layer.bias.grad, torch.full((3,), 5.0))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="put a LoRALinear with bias=True in their place"):
        apply_lora_to_model(tiny_model("bert"), ["q"], bias=True)


def test_dropout_acts_in_training_only() -> None:
    linear = LoRALinear(nn.Linear(40, 30), rank=8, dropout_probability=0.5)
    alone = LoRALayer(40, 30, dropout_probability=0.5)
    for layer in (linear.lora_layer, alone):
        nn.init.normal_(layer.lora_B)
    x = torch.randn(5, 40)
    for module in (linear, alone):
        assert not torch.equal(module.train()(x), module(x))
        assert torch.equal(module.eval()(x), module(x))


def test_targets_may_name_modules_around_linears() -> None:
    manager = apply_lora_to_model(tiny_model("bert"), ["layer.1.attention", "query"])
    names = sorted(manager.lora_layers)
    parts = ("self.query", "self.key", "self.value", "output.dense")
    wanted = {f"{BERT}.1.attention.{part}" for part in parts} | {f"{BERT}.{i}.attention.self.query" for i in range(3)}
    assert names == sorted(wanted)
    assert all(isinstance(layer, APTAdapter) for layer in manager.lora_layers.values())


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="rank must be at least 1"):
        LoRALayer(4, 4, rank=0)
    with pytest.raises(ValueError, match="give input_dimension"):
        LoRALayer(output_dimension=4)
    with pytest.raises(ValueError, match=r"original_layer must be nn\.Linear, got Embedding"):
        LoRALinear(nn.Embedding(3, 3))  # type: ignore[arg-type]
