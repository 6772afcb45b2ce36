"""What every linear method promises, whatever it is: a new name in `METHODS` is held to it by itself.

They are the invariants that PEFT tests of its own methods, over an encoder, a decoder with grouped heads and an
encoder-decoder.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from check import Unrounded, close
from tiny_models import random_plan, set_masks, tiny_batch, tiny_model
from torch import Tensor, nn

import apt
from apt.layers import APTAdapter, adapted
from apt.methods import METHODS, ROW_GATES
from apt.surgery.prune import apply_prune_plan

KINDS = ["bert", "llama_gqa", "t5"]
GENERATORS = ["llama_gqa", "t5"]
ALL = [name for name, method in METHODS.items() if method.adapts]  # prompts and "full" have tests of their own
MERGED = [name for name in ALL if not METHODS[name].per_example]
SMALL = {"rank": 2, "target_modules": ("q", "v", "up", "down"), "hyper_params": 500, "svd_cache": None}
HEADS = ("classifier", "bert.pooler")

each_kind = pytest.mark.parametrize("kind", KINDS)
each_method = pytest.mark.parametrize("method", ALL)
each_merged = pytest.mark.parametrize("method", MERGED)


def logits(model: Any, kind: str, **changes: Any) -> Tensor:
    with torch.no_grad(), Unrounded():
        found = model(**{**tiny_batch(kind), **changes}).logits
    assert isinstance(found, Tensor)
    return found


def patched(kind: str, method: str, dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    """A patched model whose adapters have left their start, as training would take them."""
    model = apt.patch_model(tiny_model(kind, dtype), method=method, **{**SMALL, **settings})
    return moved(model)


def moved(model: Any) -> Any:
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for _, module in adapted(model):
            for parameter in module.adapter_parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
        if hasattr(model, ROW_GATES):
            model.get_submodule(ROW_GATES).open.bias.fill_(2.0)
    return model


def own_parameters(model: nn.Module) -> set[str]:
    """Names of what the method trains."""
    adapters = {id(p) for _, module in adapted(model) for p in module.adapter_parameters()}
    return {name for name, p in model.named_parameters() if id(p) in adapters or name.startswith(ROW_GATES)}


@each_kind
@each_merged
def test_merged_is_the_patched_model(kind: str, method: str) -> None:
    model = patched(kind, method)
    before = logits(model, kind)
    assert (before - logits(tiny_model(kind), kind)).abs().max() > 1e-3
    merged = apt.unpatch_model(model, merge=True)
    assert not any(isinstance(module, APTAdapter) for module in merged.modules())
    assert merged.state_dict().keys() == tiny_model(kind).state_dict().keys()
    close("merged", logits(merged, kind), before)


@each_kind
@each_method
def test_unpatched_is_the_base(kind: str, method: str) -> None:
    """Bit for bit, names, dtypes and what trains included; and it can be patched again."""
    plain, model = tiny_model(kind), patched(kind, method)
    assert not torch.equal(logits(model, kind), logits(plain, kind))
    apt.unpatch_model(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == dict.fromkeys(
        dict(plain.named_parameters()), True
    )
    ours, theirs = model.state_dict(), plain.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert torch.equal(logits(model, kind), logits(plain, kind))
    close("again", logits(apt.patch_model(model, method=method, **SMALL), kind), logits(plain, kind))


@each_kind
@each_method
def test_saved_is_loaded(kind: str, method: str, tmp_path: Path) -> None:
    model = patched(kind, method)
    before = logits(model, kind)
    again = apt.patch_model(tiny_model(kind), method=method, **SMALL)
    assert not torch.equal(logits(again, kind), before)
    again.load_state_dict(model.state_dict())
    assert torch.equal(logits(again, kind), before)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, kind), before)
    apt.export_model(model, tmp_path / "model")
    close("export", logits(apt.load_model(tmp_path / "model"), kind), before)
    assert torch.equal(logits(model, kind), before)


@each_kind
@each_merged
def test_peft_loads_it(kind: str, method: str, tmp_path: Path) -> None:
    from peft import PeftModel

    model = patched(kind, method, torch.float32)
    apt.save_adapter(model, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(tiny_model(kind, torch.float32), tmp_path / "adapter").eval()
    ours = logits(model, kind)
    assert (logits(theirs, kind) - ours).abs().max() < 1e-4 * ours.abs().max().clamp(min=1.0)


@each_kind
@each_method
def test_gradients_are_where_they_belong(kind: str, method: str) -> None:
    """All that the method trains and the head get one, nothing else does, and a step moves nothing else."""
    model = patched(kind, method).train()
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    torch.manual_seed(1)
    with Unrounded():
        model(**tiny_batch(kind)).loss.backward()
    own = own_parameters(model)
    assert own
    for name, parameter in model.named_parameters():
        belongs = name in own or name.startswith(HEADS)
        assert (parameter.grad is not None) == belongs, name
        assert not belongs or name.startswith(ROW_GATES) or parameter.grad.any(), name  # a gate may be open everywhere
    optimizer.step()
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name


@each_kind
@each_method
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_gradient(kind: str, method: str, reentrant: bool) -> None:
    found = []
    for checkpointing in (False, True):
        model = patched(kind, method).train()
        model.enable_input_require_grads()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(8)
        model(**tiny_batch(kind)).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        close(name, found[1][name], gradient)


@pytest.mark.parametrize("kind", GENERATORS)
@each_method
@pytest.mark.parametrize("beams", [1, 2])
def test_generation(kind: str, method: str, beams: int) -> None:
    """With a cache, without one, and as the merged model does it."""
    model = patched(kind, method)
    batch = tiny_batch(kind, size=2)
    texts = {"input_ids": batch["input_ids"].clamp(min=1), "max_new_tokens": 4, "num_beams": beams, "do_sample": False}
    with Unrounded():
        ours = model.generate(**texts)
        assert torch.equal(ours, model.generate(**texts, use_cache=False))
        if method in MERGED:
            assert torch.equal(ours, apt.unpatch_model(model, merge=True).generate(**texts))


@each_kind
@each_method
def test_embeddings_given_are_the_tokens_given(kind: str, method: str) -> None:
    model, batch = patched(kind, method), tiny_batch(kind)
    embeds = model.get_input_embeddings()(batch["input_ids"])
    close("embeds", logits(model, kind, input_ids=None, inputs_embeds=embeds), logits(model, kind))


@pytest.mark.parametrize(("kind", "dtype"), [*((kind, torch.bfloat16) for kind in KINDS), ("bert", torch.float16)])
@each_method
def test_adapters_are_float32_on_a_narrow_base(kind: str, method: str, dtype: torch.dtype) -> None:
    model = patched(kind, method, dtype)
    own = own_parameters(model)
    parameters = dict(model.named_parameters())
    assert {parameters[name].dtype for name in own} == {torch.float32}
    assert {p.dtype for name, p in parameters.items() if name not in own and not name.startswith(HEADS)} == {dtype}
    loss = model.train()(**tiny_batch(kind)).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in parameters.values())
    apt.unpatch_model(model, merge=method in MERGED)
    assert {p.dtype for p in model.parameters()} == {dtype}


@each_kind
@each_method
def test_masked_is_shrunk(kind: str, method: str) -> None:
    model = patched(kind, method, prune=True)
    plan = random_plan(model, hidden=True, seed=1)
    set_masks(model, plan)
    masked = logits(model, kind)
    apply_prune_plan(model, plan)
    close("shrunk", logits(model, kind), masked)


@each_kind
@each_method
def test_it_goes_onto_a_pruned_model(kind: str, method: str, tmp_path: Path) -> None:
    """Pruned, exported, loaded, adapted: the start is that model; exported again it is what it became."""
    small = apt.patch_model(tiny_model(kind), rank=2)
    apply_prune_plan(
        small, random_plan(small, empty=("layers.1.neurons",) if kind != "t5" else (), hidden=True, seed=3)
    )
    apt.export_model(small, tmp_path / "small")
    start = logits(small, kind)
    model = apt.patch_model(apt.load_model(tmp_path / "small"), method=method, **SMALL)
    close("start", logits(model, kind), start)
    became = logits(moved(model), kind)
    assert (became - start).abs().max() > 1e-4
    apt.export_model(model, tmp_path / "again")
    close("again", logits(apt.load_model(tmp_path / "again"), kind), became)
