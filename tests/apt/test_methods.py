"""The spectral methods on the adapted linear, beside what their papers say, taken literally in float64."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from check import Unrounded, close
from own_loop import BRIEF, Loop, equal_bits, take_both
from tiny_models import free_heads, random_plan, set_masks, tiny_batch, tiny_model
from torch import Tensor, nn

import apt
import apt_kernels
from apt.layers import APTAdapter, adapted
from apt.methods import METHODS, ROW_GATES
from apt.methods.spectral import rotation_minus_identity
from apt.surgery.prune import apply_prune_plan

DELTAS = [name for name, method in METHODS.items() if method.make is not None]
MERGED = [name for name in DELTAS if not METHODS[name].per_example]
KINDS = ["bert", "llama_gqa", "gpt2"]
EVERYWHERE = ("q", "k", "v", "o", "up", "down")
RANK = 3


def logits(model: nn.Module, kind: str) -> Tensor:
    with torch.no_grad(), Unrounded():
        found = model(**tiny_batch(kind)).logits
    assert isinstance(found, Tensor)
    return found


def moved(model: Any, size: float = 0.3) -> Any:
    """Every adapter away from its start, as training would take it."""
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for _, module in adapted(model):
            for parameter in module.adapter_parameters():
                parameter.add_(size * torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
        if hasattr(model, ROW_GATES):
            opens = model.get_submodule(ROW_GATES).open
            opens.weight.normal_(0.0, 0.1, generator=draw)
            opens.bias.zero_()[0] = 10.0  # one gate is open in every example, the others in some
    return model


def patched(kind: str, method: str, dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    settings = {"rank": RANK, "target_modules": EVERYWHERE, **settings}
    return apt.patch_model(tiny_model(kind, dtype), method=method, **settings)


def literal(method: str, weight: Tensor, delta: Any) -> Tensor:
    """The adapted weight as the paper writes it, from a decomposition of its own."""
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    v, r = vh.T.clone(), RANK
    if method == "gsa":
        s = s.clone()
        s[: 2 * r] *= 1.0 + delta.gate
    elif method == "spectral_a":
        u = torch.cat([u[:, :r] + delta.delta_U, u[:, r:]], dim=1)
        v = torch.cat([v[:, :r] + delta.delta_Vh.T, v[:, r:]], dim=1)
    elif method == "spectral_r":
        rotations = []
        for free in (delta.turn_U, delta.turn_V):
            skew, eye = 0.5 * (free - free.T), torch.eye(r, dtype=free.dtype)
            rotations.append((eye + skew) @ torch.linalg.inv(eye - skew))
        u = torch.cat([u[:, :r] @ rotations[0], u[:, r:]], dim=1)
        v = torch.cat([v[:, :r] @ rotations[1], v[:, r:]], dim=1)
        s = s.clone()
        s[:r] *= delta.C
    return u @ torch.diag(s) @ v.T


@pytest.mark.parametrize("method", ["gsa", "spectral_a", "spectral_r"])
def test_the_forward_is_the_formula(method: str) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(20, 14).double()
    model = moved(apt.patch_model(nn.Sequential(plain), method=method, rank=RANK, target_modules=("0",)))
    x = torch.randn(5, 20, dtype=torch.float64)
    apt_kernels.reset_calls()
    with torch.no_grad():
        ours = model(x)
        wanted = nn.functional.linear(x, literal(method, plain.weight, model[0].delta), plain.bias)
    assert (ours - wanted).abs().max() < 1e-9
    assert (ours - plain(x)).abs().max() > 1e-2
    assert sum(apt_kernels.calls()["masked_lora_linear"].values()) == 1
    assert model[0].rank == 2 * RANK


@pytest.mark.parametrize("method", ["gsa", "spectral_a", "spectral_r"])
def test_gradients_are_those_of_the_formula(method: str) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(20, 14).double()
    model = moved(apt.patch_model(nn.Sequential(plain), method=method, rank=RANK, target_modules=("0",)))
    x, upstream = torch.randn(5, 20, dtype=torch.float64), torch.randn(5, 14, dtype=torch.float64)
    parameters = model[0].adapter_parameters()
    ours = torch.autograd.grad(model(x), parameters, upstream)
    wanted = torch.autograd.grad(x @ literal(method, plain.weight, model[0].delta).T, parameters, upstream)
    for mine, theirs in zip(ours, wanted, strict=True):
        assert theirs.abs().max() > 1e-3
        assert (mine - theirs).abs().max() < 1e-9


def test_the_rotation_is_orthogonal() -> None:
    free = 3.0 * torch.randn(16, 16, generator=torch.Generator().manual_seed(1))
    rotation = rotation_minus_identity(free) + torch.eye(16)
    assert (rotation @ rotation.T - torch.eye(16)).abs().max() < 1e-5
    assert not rotation_minus_identity(torch.zeros(16, 16)).any()


@pytest.mark.parametrize("method", DELTAS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_start_is_the_base(kind: str, method: str, dtype: torch.dtype) -> None:
    plain = tiny_model(kind, dtype)
    base, model = logits(plain, kind), apt.patch_model(copy.deepcopy(plain), method="lora", rank=1)
    # A head in float32 and one matrix product a layer are those of an adapted model: adapters that add zero.
    start = logits(model, kind)
    ours = logits(patched(kind, method, dtype), kind)
    if dtype == torch.bfloat16:
        assert torch.equal(ours, start)
    assert (ours.float() - base.float()).abs().max() < (1e-5 if dtype == torch.float32 else 0.2) * base.abs().max()


@pytest.mark.parametrize("method", DELTAS)
def test_only_the_adapter_and_the_head_train(method: str) -> None:
    model = moved(patched("bert", method))
    model.train()(**tiny_batch("bert")).loss.backward()
    own = {id(p) for _, module in adapted(model) for p in module.adapter_parameters()}
    for name, parameter in model.named_parameters():
        expected = id(parameter) in own or name.startswith(("classifier", "bert.pooler", ROW_GATES))
        assert (parameter.grad is not None and bool(parameter.grad.any())) == expected, name
    if method == "gsa":
        assert apt.summary(model).trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert sum(p.numel() for _, m in adapted(model) for p in m.adapter_parameters()) == 3 * 6 * 2 * RANK


@pytest.mark.parametrize("method", [*MERGED, "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_merge_and_export(kind: str, method: str, tmp_path: Path) -> None:
    model = moved(patched(kind, method))
    before = logits(model, kind)
    assert (before - logits(tiny_model(kind), kind)).abs().max() > 1e-2
    apt.export_model(model, tmp_path / "small")
    close("export", logits(apt.load_model(tmp_path / "small").double(), kind), before)
    assert apt.summary(model).params_after == apt.summary(model).params_before
    plain = apt.unpatch_model(model, merge=True)
    assert not any(isinstance(module, APTAdapter) for module in plain.modules())
    close("merge", logits(plain, kind), before)


@pytest.mark.parametrize("method", DELTAS)
def test_a_state_dict_fits_another_patched_model(method: str) -> None:
    model = moved(patched("bert", method))
    other = patched("bert", method)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other, "bert"), logits(model, "bert"))


@pytest.mark.parametrize("method", [*DELTAS, "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_masked_equals_shrunk(kind: str, method: str) -> None:
    model = moved(patched(kind, method, prune=True))
    for seed, empty in ((1, ()), (2, (free_heads(model)[0], "layers.1.neurons"))):
        plan = random_plan(model, empty=empty, seed=seed)
        set_masks(model, plan)
        masked = logits(model, kind)
        apply_prune_plan(model, plan)
        close(f"shrunk {seed}", logits(model, kind), masked)


@pytest.mark.parametrize("method", [*DELTAS, "lora"])
def test_an_adapter_on_a_pruned_model(method: str, tmp_path: Path) -> None:
    small = apt.patch_model(tiny_model("bert"), rank=2)
    apply_prune_plan(small, random_plan(small, seed=3))
    small = apt.unpatch_model(small)
    before = logits(small, "bert")
    model = apt.patch_model(small, method=method, rank=2, target_modules=EVERYWHERE)
    close("start", logits(model, "bert"), before)
    assert (logits(moved(model), "bert") - before).abs().max() > 1e-2


@pytest.mark.parametrize("method", DELTAS)
def test_checkpointing_gives_the_same_gradients(method: str) -> None:
    found = []
    for checkpointing in (False, True):
        model = moved(patched("bert", method, lora_dropout=0.3)).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(8)
        model(**tiny_batch("bert")).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        close(name, found[1][name], gradient)


def test_dropout_is_drawn_anew_and_not_in_evaluation() -> None:
    model = moved(patched("bert", "lora", lora_dropout=0.5))
    assert torch.equal(logits(model, "bert"), logits(model, "bert"))
    model.train()
    assert not torch.equal(logits(model, "bert"), logits(model, "bert"))


@pytest.mark.parametrize("method", MERGED)
def test_generation(method: str) -> None:
    model = moved(patched("llama_gqa", method))
    ids = tiny_batch("llama_gqa")["input_ids"][:1, :5]
    merged = apt.unpatch_model(copy.deepcopy(model), merge=True)
    settings = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(ids, **settings), merged.generate(ids, **settings))


@pytest.mark.parametrize("method", MERGED)
def test_a_peft_folder_holds_the_same_update(method: str, tmp_path: Path) -> None:
    from peft import PeftModel

    model = moved(patched("bert", method, torch.float32))
    apt.save_adapter(model, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(tiny_model("bert", torch.float32), tmp_path / "adapter").eval()
    assert (logits(theirs, "bert") - logits(model, "bert")).abs().max() < 1e-4 * logits(model, "bert").abs().max()
    with pytest.raises(ValueError, match="plain A and B"):
        apt.load_adapter(model, tmp_path / "adapter")


def test_the_gates_are_penalised_and_reported() -> None:
    model = patched("bert", "gsa", l1_weight=0.5)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    run = apt.Controller(model, optimizer, 10)
    gates = [module.delta.gate for _, module in adapted(model)]
    with torch.no_grad():
        gates[0][:2] = torch.tensor([0.25, -0.5])
    loss = model(**tiny_batch("bert")).loss
    close("penalty", run.loss(loss) - loss, torch.tensor(0.5 * 0.75, dtype=torch.float64))
    counts = apt.summary(model)
    assert sum(counts.active.values()) == 2
    assert "active      2 of 108 gates" in str(counts)


def test_idx_names_a_block_of_directions() -> None:
    model = patched("bert", "spectral_a", idx=2)
    _, module = next(adapted(model))
    s = torch.linalg.svdvals(module.weight)
    close("block", module.delta.S, s[2 * RANK : 3 * RANK])
    with pytest.raises(ValueError, match="singular directions 33 to 35"):
        patched("bert", "spectral_r", idx=11)


def test_a_decomposition_is_kept_by_the_hash_of_its_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from apt.methods import svd

    weight = torch.randn(300, 260, generator=torch.Generator().manual_seed(0)) * torch.linspace(0, 1, 260) ** 6
    first = svd.singular_triplets(weight, 4, str(tmp_path))
    exact = torch.linalg.svdvals(weight)[:4]
    assert (first[1] - exact).abs().max() < 1e-3 * exact[0]
    assert ((first[0] * first[1]) @ first[2] - weight).norm() < 1.001 * torch.linalg.svdvals(weight)[4:].norm()
    monkeypatch.setattr(svd, "_decompose", lambda *_: pytest.fail("it was on disk"))
    for kept, made in zip(svd.singular_triplets(weight, 4, str(tmp_path)), first, strict=True):
        assert torch.equal(kept, made)
    monkeypatch.undo()
    weight[0, 0] += 1.0
    svd.singular_triplets(weight, 4, str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 2
    for file in tmp_path.iterdir():
        file.write_bytes(b"broken")
    assert torch.equal(svd.singular_triplets(weight, 4, str(tmp_path))[1], svd.singular_triplets(weight, 4)[1])
    (tmp_path / "file").write_text("no folder", encoding="utf-8")
    with pytest.warns(UserWarning, match="svd_cache: nothing is kept in"):
        unkept = svd.singular_triplets(weight, 4, str(tmp_path / "file" / "svd"))
    assert torch.equal(unkept[1], svd.singular_triplets(weight, 4)[1])


@pytest.mark.parametrize("method", [*DELTAS, "lora"])
def test_a_run_prunes_with_any_method_and_resumes_exactly(method: str, tmp_path: Path) -> None:
    settings = {"target_sparsity": 0.4, "verify_events": True, **BRIEF}
    whole = Loop("bert", patched("bert", method, prune=True).train(), **settings).take(12)
    resumed = whole.resumed(patched("bert", method, prune=True).train(), tmp_path, **settings)
    take_both(whole, resumed, 18)
    assert sum(event.prune is not None for event in whole.run.events) == 3
    assert all(not event.rank or not event.rank.ranks for event in whole.run.events)
    assert apt.summary(whole.model).sparsity > 0.3
    assert equal_bits(resumed.model, whole.model)
