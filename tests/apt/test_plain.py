"""What counts as a linear: whoever is more than ``W x + b`` keeps what it is, or is refused by name."""

import copy
import importlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.utils.prune
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from check import close
from tiny_models import fill_adapters, random_plan, tiny_batch, tiny_model
from torch import Tensor, nn

import apt
from apt.families.plain import find_obstacle, weights_read
from apt.layers import adapted
from apt.surgery.prune import apply_prune_plan

Q = "model.layers.0.self_attn.q_proj"
Change = Callable[[nn.Module], Any]


class Squashing(nn.Linear):
    """As routers are: a linear, and something more."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).tanh()


class EightBit(nn.Linear):
    """As quantised linears are: a weight of whole numbers."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight.to(input.dtype) / 50)


class Marked(nn.Linear):
    """A class of its own that computes as `nn.Linear` does."""


class ByAnotherName(torch.nn.Parameter):
    """As tensor classes of quantisers are: it looks like what it stands for."""


def take_class(model: nn.Module, name: str, kind: type[nn.Linear]) -> None:
    """Make the linear of that name one of another class, with the same numbers."""
    model.get_submodule(name).__class__ = kind


def in_eight_bits(model: nn.Module) -> None:
    take_class(model, Q, EightBit)
    linear: Any = model.get_submodule(Q)
    linear.weight = nn.Parameter((linear.weight.data * 50).to(torch.int8), requires_grad=False)


def in_a_tensor_class(model: nn.Module) -> None:
    linear: Any = model.get_submodule(Q)
    linear.weight = ByAnotherName(linear.weight.data)


CASES: dict[str, tuple[Change, str]] = {
    "a forward of its own": (lambda model: take_class(model, Q, Squashing), r"has a forward of its own \(Squashing\)"),
    "a forward hook": (
        lambda model: model.get_submodule(Q).register_forward_hook(lambda module, args, output: output * 1.5),
        "has hooks",
    ),
    "a hook before the forward": (
        lambda model: model.get_submodule(Q).register_forward_pre_hook(lambda module, args: (args[0] * 1.5,)),
        "has hooks",
    ),
    "a backward hook": (
        lambda model: model.get_submodule(Q).register_full_backward_hook(lambda module, before, after: None),
        "has hooks",
    ),
    "old weight_norm": (
        lambda model: torch.nn.utils.weight_norm(model.get_submodule(Q)),
        "has no weight parameter, its weight is computed; .*remove_weight_norm",
    ),
    "new weight_norm": (
        lambda model: torch.nn.utils.parametrizations.weight_norm(model.get_submodule(Q)),
        "is parametrized; call .*remove_parametrizations",
    ),
    "prune": (
        lambda model: torch.nn.utils.prune.l1_unstructured(model.get_submodule(Q), "weight", 0.3),
        r"has no weight parameter, its weight is computed; .*prune\.remove",
    ),
    "a replaced forward": (
        lambda model: add_hook_to_module(model.get_submodule(Q), AlignDevicesHook("cpu")),
        "has its forward replaced, as accelerate does",
    ),
    "offloaded": (lambda model: model.get_submodule(Q).to("meta"), "has no weight here: it is offloaded"),
}
QUANTISED: dict[str, Change] = {"whole numbers": in_eight_bits, "a tensor class": in_a_tensor_class}


def changed(change: Change) -> Any:
    """A Llama one of whose linears is more than plain."""
    model = tiny_model("llama", torch.float32)
    change(model)
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**tiny_batch("llama")).logits
    return found


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("targets", [None, "all-linear", r".*\.[qv]_proj", ["self_attn"]], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_what_was_not_named_is_kept_and_told_once(case: str, targets: Any) -> None:
    change, words = CASES[case]
    model = changed(change)
    linear = model.get_submodule(Q)
    wanted = None if case == "offloaded" else logits(model)
    with pytest.warns(UserWarning, match=f"no adapter goes to {Q}: each {words.partition(';')[0]}") as told:
        apt.patch_model(model, method="lora", target_modules=targets)
    assert sum("no adapter goes to" in str(warning.message) for warning in told) == 1
    assert model.get_submodule(Q) is linear
    assert Q not in apt.summary(model).ranks
    assert Q.replace("layers.0", "layers.1") in apt.summary(model).ranks
    if wanted is not None:
        assert torch.equal(logits(model), wanted)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize(
    "settings",
    [{"target_modules": ["q_proj"]}, {"target_modules": ["q"]}, {"method": "apt"}],
    ids=["ending", "role", "apt"],
)
@pytest.mark.parametrize("case", CASES)
def test_what_was_named_or_is_to_be_pruned_is_refused_before_anything_changes(
    case: str, settings: dict[str, Any]
) -> None:
    change, words = CASES[case]
    model = changed(change)
    kinds = [type(module) for module in model.modules()]
    text, _, advice = words.partition("; ")
    words = f"{text}.*, so it cannot be pruned; .*{advice}" if settings.get("method") == "apt" else words
    with pytest.raises(ValueError, match=f"patch_model: {Q} {words}") as caught:
        apt.patch_model(model, **{"method": "lora", **settings})
    assert "\n" not in str(caught.value)
    assert [type(module) for module in model.modules()] == kinds
    assert all(parameter.requires_grad for parameter in model.parameters() if parameter.is_floating_point())


@pytest.mark.parametrize("settings", [{}, {"target_modules": ["q_proj"]}, {"target_modules": "all-linear"}], ids=str)
@pytest.mark.parametrize("case", QUANTISED)
def test_quantised_weights_are_refused_with_what_to_do(case: str, settings: dict[str, Any]) -> None:
    """Whether they were named or not: to leave them all out would leave nothing to train."""
    model = changed(QUANTISED[case])
    with pytest.raises(ValueError, match=f"{Q} is quantised .*; load the model without quantization"):
        apt.patch_model(model, method="lora", **settings)


def test_a_layer_of_packed_weights_that_is_no_linear_of_torch() -> None:
    """As GPTQ's and AWQ's are."""
    model = tiny_model("llama", torch.float32)
    packed = nn.Module()
    packed.register_buffer("qweight", torch.zeros(4, 32, dtype=torch.int32))
    model.model.layers[1].self_attn.q_proj = packed
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj is quantised or packed \(Module\)"):
        apt.patch_model(model, method="lora", target_modules=["q_proj"])


OF_TRANSFORMERS = (
    ("models.llama4.modeling_llama4", "Llama4Router"),
    ("models.phimoe.modeling_phimoe", "PhimoeTopKRouter"),
    ("models.idefics.modeling_idefics", "IdeficsDecoupledLinear"),
    ("integrations.bitnet", "AutoBitLinear"),
    ("integrations.compressed_tensors", "CompressedTensorsFP8Linear"),
    ("integrations.finegrained_fp8", "FP8Linear"),
)


@pytest.mark.parametrize(("place", "kind"), OF_TRANSFORMERS, ids=[kind for _, kind in OF_TRANSFORMERS])
def test_classes_of_transformers_that_are_more_than_a_linear(place: str, kind: str) -> None:
    found = getattr(importlib.import_module(f"transformers.{place}"), kind)
    with pytest.raises(ValueError, match=rf"{Q} has a forward of its own \({kind}\); leave it out"):
        apt.patch_model(changed(lambda model: take_class(model, Q, found)), method="lora", target_modules=["q_proj"])


def test_a_class_that_computes_as_a_linear_does_is_one() -> None:
    from transformers import FalconConfig, FalconForCausalLM

    model = changed(lambda model: take_class(model, Q, Marked))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apt.patch_model(model)
    assert Q in apt.summary(model).ranks
    sizes = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    falcon = FalconForCausalLM(FalconConfig(**sizes)).eval()
    ids = torch.arange(9)[None]
    with torch.no_grad():
        wanted = falcon(ids).logits
        apt.patch_model(falcon, method="lora")
        close("FalconLinear", falcon(ids).logits, wanted)
    assert apt.summary(falcon).ranks == {"transformer.h.0.self_attention.query_key_value": 8}


def test_a_model_without_numbers_is_one_all_the_same() -> None:
    """A dry run patches it to count."""
    plain = tiny_model("llama", torch.float32)
    model = apt.patch_model(copy.deepcopy(plain).to("meta"))
    ranks = {name: layer.rank for name, layer in adapted(model)}
    assert ranks == {name: layer.rank for name, layer in adapted(apt.patch_model(plain))}
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_a_fused_projection_with_a_hook_stays_whole() -> None:
    model = tiny_model("gpt2", torch.float32)
    place = "transformer.h.0.attn.c_attn"
    model.get_submodule(place).register_forward_hook(lambda module, args, output: output * 1.5)
    twin = copy.deepcopy(model)
    with pytest.warns(UserWarning, match=rf"no adapter goes to {place}\.q, {place}\.v: each has hooks"):
        apt.patch_model(model, method="lora", target_modules=None)
    with torch.no_grad():
        batch = tiny_batch("gpt2")
        close("logits", model(**batch).logits, twin(**batch).logits)
    with pytest.raises(ValueError, match=f"{place} has hooks"):
        apt.patch_model(twin, method="lora", target_modules=["q"])


def test_a_head_with_a_hook_keeps_it_and_the_hidden_dimensions_stay() -> None:
    model = changed(lambda model: model.lm_head.register_forward_hook(lambda module, args, output: output * 1.5))
    twin = copy.deepcopy(model)
    wanted = logits(model)
    fill_adapters(apt.patch_model(model))
    assert apt.summary(model).hidden == 0
    apply_prune_plan(model, random_plan(model, seed=1))
    assert apt.summary(model).sparsity > 0.2
    close("head", logits(apt.unpatch_model(apt.patch_model(copy.deepcopy(twin)))), wanted)
    with pytest.raises(ValueError, match="lm_head has hooks, so hidden dimensions cannot go; take 'hidden' out of"):
        apt.patch_model(twin, unit_types=("head", "hidden"))


def test_a_weight_that_is_read_and_not_called() -> None:
    """Mamba multiplies by the weight of dt_proj itself; WavLM hands those of q, k and v to one function of torch."""
    from transformers import MambaConfig, MambaForCausalLM, WavLMConfig, WavLMModel

    mamba = MambaForCausalLM(MambaConfig(vocab_size=60, hidden_size=16, num_hidden_layers=1, state_size=4))
    with pytest.raises(ValueError, match=r"dt_proj is read past: MambaMixer takes its weight without calling it"):
        apt.patch_model(mamba, method="lora", target_modules=["dt_proj"])
    with pytest.warns(UserWarning, match=r"no adapter goes to .*dt_proj.*: each is read past"):
        apt.patch_model(mamba, method="lora")
    ids = torch.arange(9)[None]
    mamba(ids, labels=ids).loss.backward()
    trained = [(name, p) for name, p in mamba.named_parameters() if p.requires_grad]
    assert trained
    assert all(p.grad is not None for _, p in trained)
    small = {"conv_dim": (8,), "conv_stride": (4,), "conv_kernel": (4,), "num_feat_extract_layers": 1}
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    wavlm = WavLMModel(WavLMConfig(**sizes, **small, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2))
    with pytest.raises(ValueError, match="q_proj is read past: WavLMAttention takes"):
        apt.patch_model(wavlm, method="lora", target_modules=["q_proj"])


class Asks(nn.Module):
    """Uses weights in ways that do not go past the linear, and in two that do."""

    def __init__(self) -> None:
        super().__init__()
        names = ("asked", "tested", "called", "multiplied", "handed", "penalised")
        for name in names:
            self.add_module(name, nn.Linear(4, 4))
        nn.init.zeros_(self.asked.weight)

    def penalty(self) -> Tensor:
        return torch.linalg.norm(self.penalised.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.asked(x.to(self.asked.weight.dtype))
        if isinstance(self.tested.weight, Tensor) and self.tested.weight.dtype != torch.int8:
            x = self.penalised(self.tested(x))
        return self.called(x) @ self.multiplied.weight + nn.functional.linear(x, weight=self.handed.weight)


def test_which_weights_a_forward_reads_past_the_linear() -> None:
    assert weights_read(Asks) == {"multiplied", "handed"}
    assert weights_read(nn.MultiheadAttention) == {"out_proj"}
    assert weights_read(nn.TransformerEncoderLayer) >= {"linear1", "linear2"}
    assert weights_read(type(tiny_model("llama").model.layers[0].self_attn)) == frozenset()


@pytest.mark.parametrize("name", ["llama", "bert", "t5", "gpt2", "phi3", "deberta", "distilbert", "opt", "gemma3"])
def test_linears_of_families_are_plain(name: str) -> None:
    from apt.families.linears import is_linear

    model = tiny_model(name)
    linears = [place for place, module in model.named_modules() if is_linear(module)]
    assert linears
    assert {place: find_obstacle(model, place) for place in linears} == dict.fromkeys(linears)


def test_a_linear_to_build_with_is_held_to_the_same() -> None:
    from apt.efficient_finetuning import LoRALinear

    linear = nn.Linear(4, 4)
    linear.register_forward_hook(lambda module, args, output: output * 1.5)
    with pytest.raises(ValueError, match="LoRALinear: original_layer has hooks; remove them first"):
        LoRALinear(linear)
