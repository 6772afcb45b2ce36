"""Projections that a model stores as one, and the linears of GPT-2, which it stores the other way round."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from check import close
from own_loop import BRIEF, Loop
from safetensors.torch import load_file
from tiny_models import fill_adapters, random_plan, set_masks, tiny_batch, tiny_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import apt
from apt.families import anatomy_of
from apt.families.layer_config import LayerConfig
from apt.families.linears import make_linear, weight_and_bias
from apt.layers import APTAdapter, adapted
from apt.layers.fused import FusedLinears, plain_linear, split_linear
from apt.pruning.units import find_units
from apt.surgery.prune import apply_prune_plan

FUSED = ("gpt2", "phi3")
PLACES = {
    "gpt2": ["transformer.h.0.attn.c_attn"],
    "phi3": [f"model.layers.0.{p}" for p in ("self_attn.qkv_proj", "mlp.gate_up_proj")],
}


def conv1d(outputs: int, inputs: int) -> nn.Module:
    layer = Conv1D(outputs, inputs).double()
    nn.init.normal_(layer.bias)
    return layer


KINDS = {
    "linear": lambda o, i: nn.Linear(i, o).double(),
    "no bias": lambda o, i: nn.Linear(i, o, bias=False).double(),
    "Conv1D": conv1d,
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_on_either_kind_is_that_layer_and_comes_back_as_it(kind: str) -> None:
    layer, x = KINDS[kind](5, 3), torch.randn(2, 4, 3, dtype=torch.float64)
    wanted, numbers = layer(x).detach(), copy.deepcopy(layer.state_dict())
    adapter = APTAdapter(layer, rank=2)
    close("start", adapter(x).detach(), wanted)
    nn.init.normal_(adapter.lora_B)
    trained = adapter(x).detach()
    assert (trained - wanted).abs().max() > 1e-2
    merged = plain_linear(adapter, merge=True)
    assert type(merged) is type(layer)
    close("merged", merged(x), trained)
    back = plain_linear(adapter, merge=False)
    assert str(back) == str(layer)
    assert back.state_dict().keys() == numbers.keys()
    assert all(torch.equal(back.state_dict()[key], numbers[key]) for key in numbers)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("sizes", [{"q": 4, "k": 2, "v": 2}, {"gate": 3, "up": 3}, {"q": 0, "k": 0, "v": 0}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_split_and_joined_again_to_the_bit(kind: str, sizes: dict[str, int]) -> None:
    layer = KINDS[kind](sum(sizes.values()), 3)
    numbers = copy.deepcopy(layer.state_dict())
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    wanted = layer(x).detach()
    parts = split_linear(layer, sizes)
    assert {role: part.out_features for role, part in parts.named_children()} == sizes
    close("split", parts(x), wanted)
    joined = plain_linear(parts, merge=False)
    assert (type(joined), str(joined)) == (type(layer), str(layer))
    assert list(joined.state_dict()) == list(numbers)
    assert all(torch.equal(joined.state_dict()[key], numbers[key]) for key in numbers)


def test_a_transposed_layer_without_inputs_computes_its_bias() -> None:
    """`Conv1D` itself cannot: it reshapes an empty tensor."""
    empty = make_linear(torch.zeros(3, 0), torch.arange(3.0), conv1d=True)
    assert torch.equal(empty(torch.zeros(2, 5, 0)), torch.arange(3.0).expand(2, 5, 3))


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
def test_adapters_on_whole_transposed_layers_equal_peft() -> None:
    from peft import LoraConfig, get_peft_model

    places = ["c_attn", "c_proj", "c_fc"]
    ours = fill_adapters(apt.patch_model(tiny_model("gpt2"), method="lora", target_modules=places, rank=4, scale=2.0))
    settings = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": places, "fan_in_fan_out": True}
    theirs = get_peft_model(tiny_model("gpt2"), LoraConfig(**settings))
    pairs = []
    for place, module in adapted(ours):
        layer = theirs.base_model.model.get_submodule(place)
        for mine, other in ((module.lora_A, layer.lora_A["default"]), (module.lora_B, layer.lora_B["default"])):
            other.weight.data = mine.data.clone()
            pairs.append((place, mine, other.weight))
    outputs = [model(**tiny_batch("gpt2")) for model in (ours, theirs)]
    close("logits", outputs[0].logits, outputs[1].logits)
    for output in outputs:
        output.loss.backward()
    assert len(pairs) == 2 * 3 * 4
    for place, mine, other in pairs:
        close(place, mine.grad, other.grad)
    apt.unpatch_model(ours, merge=True)
    merged = theirs.merge_and_unload()
    for (name, mine), (other, tensor) in zip(ours.state_dict().items(), merged.state_dict().items(), strict=True):
        assert name == other
        close(name, mine, tensor)


@pytest.mark.parametrize(
    ("method", "targets", "wanted"),
    [
        ("apt", ["c_attn"], ["attn.c_attn.q", "attn.c_attn.k", "attn.c_attn.v"]),
        ("apt", ["h.1.attn.c_attn.k"], ["attn.c_attn.k"]),
        ("apt", ["o", "c_fc"], ["attn.c_proj", "mlp.c_fc"]),
        ("lora", ["c_attn"], ["attn.c_attn"]),
        ("lora", ["v", "up"], ["attn.c_attn.v", "mlp.c_fc"]),
        ("lora", ["q", "c_attn"], ["attn.c_attn.q", "attn.c_attn.k", "attn.c_attn.v"]),
    ],
)
def test_targets(method: str, targets: list[str], wanted: list[str]) -> None:
    model = apt.patch_model(tiny_model("gpt2"), method=method, target_modules=targets)
    layers = [1] if "h.1" in targets[0] else [0, 1, 2]
    assert [n for n, m in adapted(model) if m.rank] == [f"transformer.h.{i}.{name}" for i in layers for name in wanted]
    split = any(isinstance(module, FusedLinears) for module in model.modules())
    assert split == (method == "apt" or wanted != ["attn.c_attn"])


@pytest.mark.parametrize("name", FUSED)
def test_a_run_prunes_and_exports_stock_names(name: str, tmp_path: Path) -> None:
    stock = {key: value.shape for key, value in tiny_model(name).state_dict().items()}
    model = apt.patch_model(tiny_model(name, torch.float32), rank=3, target_modules=["q", "v", "up", "down"]).train()
    loop = Loop(name, model, 30, target_sparsity=0.5, min_heads=1, verify_events=True, **BRIEF).take(30)
    counts = apt.summary(model)
    assert counts.sparsity >= 0.5
    listed = {id(p) for group in loop.optimizer.param_groups for p in group["params"]}
    assert listed == {id(p) for p in model.parameters() if p.requires_grad}
    state = loop.optimizer.state
    assert all(state[p]["exp_avg"].shape == p.shape for p in model.parameters() if p.requires_grad)
    apt.export_model(model.eval(), tmp_path / "export")
    stored = load_file(tmp_path / "export/model.safetensors")
    tied = {"lm_head.weight"} if name == "gpt2" else set()
    assert stored.keys() == stock.keys() - tied
    assert any(stored[key].shape != stock[key] for key in stored)
    loaded = apt.load_model(tmp_path / "export")
    assert [type(m) for m in loaded.modules() if isinstance(m, APTAdapter | FusedLinears)] == []
    with torch.no_grad():
        wanted = model(**tiny_batch(name)).logits
        close("loaded", loaded(**tiny_batch(name)).logits, wanted)
        again = apt.patch_model(loaded)
        close("patched again", again(**tiny_batch(name)).logits, wanted)
        close("unpatched", apt.unpatch_model(model, merge=True)(**tiny_batch(name)).logits, wanted)
    assert apt.summary(again).units == counts.units
    for place in PLACES[name]:
        assert type(model.get_submodule(place)) is type(tiny_model(name).get_submodule(place))


def scaled_otherwise(name: str, **settings: Any) -> Any:
    """In float32, as that is what `reorder_and_upcast_attn` computes in."""
    model = tiny_model(name, torch.float32, attn_implementation="eager", **settings)
    return fill_adapters(apt.patch_model(model, rank=3, target_modules=["q", "k", "v", "o"]))


@pytest.mark.parametrize("flag", ["scale_attn_weights", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"])
def test_masked_equals_shrunk_however_gpt2_scales(flag: str) -> None:
    settings = {"scale_attn_by_inverse_layer_idx": False}
    settings[flag] = flag != "scale_attn_weights"
    model = scaled_otherwise("gpt2", **settings)
    batch = tiny_batch("gpt2")
    with torch.no_grad():
        for seed in (1, 2):
            plan = random_plan(model, empty=["layers.2.heads"], seed=seed)
            whole = model(**batch).logits
            set_masks(model, plan)
            masked = model(**batch).logits
            assert (masked - whole).abs().max() > 1e-2
            apply_prune_plan(model, plan)
            close(flag, model(**batch).logits, masked)


def test_an_empty_attention_of_gpt2_keeps_its_dropout() -> None:
    """In training the bias of its output projection goes through it, with heads and without."""
    model = apt.patch_model(tiny_model("gpt2", resid_pdrop=0.5)).train()
    plan = random_plan(model, empty=["layers.2.heads"], keep=1.0, seed=1)
    found = []
    for cut in (False, True):
        if cut:
            apply_prune_plan(model, plan)
        else:
            set_masks(model, plan)
        torch.manual_seed(5)
        found.append(model(**tiny_batch("gpt2")).logits.detach())
    close("with the same draws", found[1], found[0])


def test_the_choice_head_of_a_model_with_two_heads_trains() -> None:
    from transformers import GPT2DoubleHeadsModel

    model = apt.patch_model(GPT2DoubleHeadsModel(tiny_model("gpt2").config))
    heads = {name for name, p in model.named_parameters() if p.requires_grad and "lora" not in name}
    assert heads == {"multiple_choice_head.summary.weight", "multiple_choice_head.summary.bias"}


def test_head_counts_of_a_layer_leave_the_config_of_the_model_alone() -> None:
    """Phi-3 reads them from there."""
    model = apt.patch_model(tiny_model("phi3"))
    saved = model.config.to_dict()
    apply_prune_plan(model, random_plan(model, empty=["layers.2.heads"], seed=1))
    first, second, _ = (layer.self_attn for layer in model.model.layers)
    kept = [group.num_units for group in find_units(anatomy_of(model)) if group.kind == "head"]
    assert [first.config.num_attention_heads, second.config.num_attention_heads] == [2 * n for n in kept]
    assert model.config.to_dict() == saved
    twin = copy.deepcopy(model)
    assert isinstance(twin.model.layers[0].self_attn.config, LayerConfig)
    twin.set_attn_implementation("eager")
    assert twin.model.layers[0].self_attn.config._attn_implementation == "eager"
    assert first.config._attn_implementation == model.config._attn_implementation != "eager"
    assert not hasattr(first.config, "no_such_setting")


def test_cross_attention_is_refused() -> None:
    with pytest.raises(ValueError, match="gpt2 with cross-attention cannot be pruned"):
        apt.patch_model(tiny_model("gpt2", add_cross_attention=True))


@pytest.mark.parametrize("name", FUSED)
def test_parts_are_computed_together(name: str) -> None:
    import apt_kernels

    model = fill_adapters(apt.patch_model(tiny_model(name), target_modules=["q", "v"]))
    apt_kernels.reset_calls()
    model(**tiny_batch(name)).loss.backward()
    assert apt_kernels.calls() == {"masked_lora_linears": {"torch": 3}}


def test_weights_of_either_kind_are_read_alike() -> None:
    layer = conv1d(5, 3)
    weight, bias = weight_and_bias(layer)
    assert (weight.shape, weight.is_contiguous(), weight.requires_grad) == ((5, 3), True, False)
    x: Tensor = torch.randn(4, 3, dtype=torch.float64)
    close("product", nn.functional.linear(x, weight, bias), layer(x))
