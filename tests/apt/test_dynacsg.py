"""Gates that depend on the example, beside what the hypothesis says, taken literally in float64."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from check import Unrounded, close
from own_loop import BRIEF, Loop
from tiny_models import has_hidden_table, random_plan, set_masks, tiny_batch, tiny_model
from torch import Tensor, nn

import apt
import apt_kernels
from apt.layers import adapted
from apt.layers.own_methods import given_to
from apt.methods import ROW_GATES
from apt.methods.context import GateContext
from apt.methods.hypernetwork import logistic_noise, open_gates
from apt.surgery.prune import apply_prune_plan

RANK, ALPHA = 3, 0.5
EVERYWHERE = ("q", "k", "v", "o", "up", "down")


def patched(kind: str, dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    """A patched model whose gates differ from example to example."""
    settings = {"rank": RANK, "target_modules": EVERYWHERE, "gate_alpha": ALPHA, "hyper_params": 2000, **settings}
    model = apt.patch_model(tiny_model(kind, dtype), method="dynacsg", **settings)
    opens, draw = model.apt_gates.open, torch.Generator().manual_seed(4)
    with torch.no_grad():
        opens.weight.copy_(torch.randn(opens.weight.shape, generator=draw))
    spread(model, tiny_batch(kind))
    return model


@torch.no_grad()
def spread(model: Any, batch: dict[str, Tensor]) -> None:
    """Let each gate be open in about half of the examples of a batch."""
    run(model, batch)
    context = context_of(model)
    model.apt_gates.open.bias.sub_(model.apt_gates(examples_of(model).context).mean(0))
    context._forget()
    context.passes.here.latest = None


def examples_of(model: nn.Module) -> Any:
    """What the latest pass read."""
    known = context_of(model).passes.known
    return None if known is None else known.examples


def context_of(model: nn.Module) -> GateContext:
    linear = next(linear for _, linear in adapted(model) if linear.row_gate is not None)
    return linear.row_gate.context  # type: ignore[union-attr, no-any-return, attr-defined]


def run(model: Any, batch: dict[str, Tensor], **more: Any) -> Any:
    with torch.no_grad(), Unrounded():
        return model(**batch, **more)


def own_gates(model: Any, stream: Tensor, weights: Tensor) -> Tensor:
    """The network on the contexts, written anew: ``[B, R]`` of 0 and 1."""
    hyper = model.apt_gates
    context = (weights[:, :, None] * stream).sum(1) / weights.sum(1)[:, None]
    context = (context - context.mean(1, keepdim=True)) / (context.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    middle = (context @ hyper.read.weight.T + hyper.read.bias).clamp(min=0)
    return ((middle @ hyper.open.weight.T + hyper.open.bias) > 0).double()


def literal(kind: str, gates: Tensor, row: int, **settings: Any) -> Any:
    """A plain model with the weights that one example has: every S_i of a decomposition of its own scaled."""
    model = apt.patch_model(tiny_model(kind), method="lora", rank=1, target_modules=EVERYWHERE)
    names = [name for name, _ in adapted(patched(kind, **settings)) if _.rank]
    with torch.no_grad():
        for name in names:
            weight = model.get_submodule(name).weight
            u, s, vh = torch.linalg.svd(weight, full_matrices=False)
            s[:RANK] *= 1.0 + ALPHA * gates[row]
            weight.copy_(u @ torch.diag(s) @ vh)
    return model


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama_gqa", "opt"])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("context", ["first", "mean"])
def test_each_example_has_its_own_weights(kind: str, layer: int, context: str) -> None:
    """Every example, alone in a plain model with the weights that its gates make, gives the same logits."""
    batch = tiny_batch(kind)
    decoder = kind != "bert"
    if decoder:
        batch["labels"][:, :4] = -100  # the prompt
    model = patched(kind, context_layer=layer, context=context)
    apt_kernels.reset_calls()
    ours = run(model, batch).logits
    ran = sum(apt_kernels.calls()["masked_lora_linear"].values())
    assert ran == sum(1 for _, linear in adapted(model) if linear.rank)
    valid = batch["attention_mask"].double()
    weights = valid.clone()
    if decoder:
        weights[:, 4:] = 0.0
    elif context == "first":
        weights[:, 1:] = 0.0
    stream = run(tiny_model(kind), batch, output_hidden_states=True).hidden_states[layer + 1]
    gates = own_gates(model, stream, weights)
    assert len(gates.unique(dim=0)) > 1
    for row in range(len(gates)):
        plain = literal(kind, gates, row, context_layer=layer)
        wanted = run(plain, {name: value[row : row + 1] for name, value in batch.items()}).logits
        keep = valid[row].bool() if decoder else slice(None)  # a padding token attends to nothing in some families
        assert (ours[row] - wanted[0])[keep].abs().max() < 1e-9
    assert (ours - run(tiny_model(kind), batch).logits).abs().max() > 1e-3


def test_the_gradient_is_that_of_the_sigmoid() -> None:
    logits = torch.tensor([[-1.0, 0.5, 2.0]], dtype=torch.float64, requires_grad=True)
    noise = torch.tensor([[1.5, -1.0, 0.0]], dtype=torch.float64)
    gate = open_gates(logits, noise, 0.5)
    assert torch.equal(gate, torch.tensor([[1.0, 0.0, 1.0]], dtype=torch.float64))
    upstream = torch.tensor([[0.3, -2.0, 1.1]], dtype=torch.float64)
    soft = torch.sigmoid((logits.detach() + noise) / 0.5)
    (gradient,) = torch.autograd.grad(gate, logits, upstream)
    close("gradient", gradient, upstream * soft * (1 - soft) / 0.5)


def test_a_gate_opens_as_often_as_its_logit_says() -> None:
    torch.manual_seed(0)
    noise = logistic_noise(torch.empty(200_000))
    for logit in (-3.0, 0.0, 1.0):
        share = float((noise + logit > 0).float().mean())
        assert abs(share - float(torch.sigmoid(torch.tensor(logit)))) < 0.004


def test_about_64k_parameters_train_beside_the_head() -> None:
    model = apt.patch_model(tiny_model("bert", torch.float32), method="dynacsg")
    hyper = sum(p.numel() for p in model.apt_gates.parameters())
    assert abs(hyper - 65536) < 100
    head = sum(p.numel() for name, p in model.named_parameters() if name.startswith(("classifier", "bert.pooler")))
    assert apt.summary(model).trainable_params == hyper + head
    assert not any(name.startswith("bert.encoder.layer.0.") for name in apt.summary(model).ranks)


@pytest.mark.parametrize("kind", ["llama_gqa", "gpt2"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_a_cache_is_a_full_recomputation(kind: str, beams: int) -> None:
    """The gates are those of the prompt at every step: with a cache, without one, and with them held fixed."""
    model, ids = patched(kind), tiny_batch(kind)["input_ids"][:3, :5].clamp(min=1)
    spread(model, {"input_ids": ids, "labels": torch.full_like(ids, -100)})
    assert len(own_prompt_gates(model, ids).unique(dim=0)) > 1
    ids = torch.cat([torch.zeros_like(ids[:, :2]), ids], 1)  # padding on the left
    mask = (ids != 0).long()
    settings = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams, "pad_token_id": 0, "attention_mask": mask}
    with Unrounded():
        cached = model.generate(ids, **settings, return_dict_in_generate=True, output_scores=True)
        whole = model.generate(ids, **settings, use_cache=False, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(cached.sequences, whole.sequences)
    for ours, wanted in zip(cached.scores, whole.scores, strict=True):
        finite = wanted.isfinite()
        assert (ours - wanted)[finite].abs().max() < 1e-5
    # Labels that begin to count after the prompt mark the same one, so a full pass gives the same scores.
    if beams == 1:
        labels = cached.sequences.clone()
        labels[:, : ids.shape[1]] = -100
        full = torch.cat([mask, torch.ones_like(cached.sequences[:, ids.shape[1] :])], 1)
        places = (full.cumsum(1) - 1).clamp(min=0)
        inputs = {"input_ids": cached.sequences, "attention_mask": full, "position_ids": places}
        logits = run(model, {**inputs, "labels": labels}).logits
        assert (logits[:, -2] - cached.scores[-1]).abs().max() < 1e-5  # scores are float32
        assert (run(model, inputs).logits - logits).abs().max() > 1e-3


def own_prompt_gates(model: Any, ids: Tensor) -> Tensor:
    """What the network makes of a prompt without padding."""
    run(model, {"input_ids": ids, "labels": torch.full_like(ids, -100)})
    with torch.no_grad():
        return context_of(model).gates()


def test_no_token_sees_a_later_one() -> None:
    model, batch = patched("llama_gqa"), tiny_batch("llama_gqa", size=1)
    first = run(model, {"input_ids": batch["input_ids"][:, :4]}).logits
    whole = run(model, {"input_ids": batch["input_ids"]}).logits
    assert (whole[:, :4] - first).abs().max() < 1e-9


def test_beams_of_an_encoder_decoder_have_the_gates_of_their_text() -> None:
    model, batch = patched("t5"), tiny_batch("t5")
    texts = {name: batch[name] for name in ("input_ids", "attention_mask")}
    settings = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False}
    run(model, {"input_ids": batch["input_ids"], "labels": batch["labels"]})  # another pass before, of other texts
    with Unrounded():
        together = model.generate(**texts, **settings)
        for row in range(len(together)):
            alone = model.generate(**{name: value[row : row + 1] for name, value in texts.items()}, **settings)
            assert torch.equal(together[row, : alone.shape[1]], alone[0])


def test_relative_positions_belong_to_no_example() -> None:
    """An example has the same logits alone as in a batch, with as many tokens as there are relative positions too."""
    model, batch = patched("deberta"), tiny_batch("deberta", length=8)
    together = run(model, batch).logits
    for row in range(len(together)):
        alone = run(model, {name: value[row : row + 1] for name, value in batch.items()}).logits
        assert (alone[0] - together[row]).abs().max() < 1e-9


class Halved(torch.nn.Module):
    """Stands where positions are dropped out: like dropout it makes a new tensor, but always the same one."""

    def forward(self, positions: Tensor) -> Tensor:
        return 0.5 * positions


def test_positions_that_were_dropped_out_are_still_of_no_example() -> None:
    model, plain = tiny_model("deberta"), tiny_model("deberta")
    for side in (model, plain):
        for layer in side.deberta.encoder.layer:
            layer.attention.self.pos_dropout = Halved()
    apt.patch_model(model, method="dynacsg", target_modules=("q", "k"), rank=RANK)
    batch = tiny_batch("deberta", length=8)
    close("all gates shut", run(model, batch).logits, run(plain, batch).logits)
    torch.nn.init.normal_(model.apt_gates.open.weight)
    spread(model, batch)
    together = run(model, batch).logits
    assert (together - run(plain, batch).logits).abs().max() > 1e-6
    for row in range(len(together)):
        alone = run(model, {name: value[row : row + 1] for name, value in batch.items()}).logits
        assert (alone[0] - together[row]).abs().max() < 1e-9


def test_another_batch_below_is_refused() -> None:
    model, batch = patched("bert"), tiny_batch("bert")
    layer = model.bert.encoder.layer[2].intermediate.dense
    with pytest.raises(ValueError, match="before any example passed"):
        layer(torch.zeros(2, 5, 32, dtype=torch.float64))
    run(model, batch)
    with pytest.raises(ValueError, match=r"gates are of 4 examples, but a layer got an input of \[3, 5, 32\]"):
        layer(torch.zeros(3, 5, 32, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["bert", "llama_gqa", "t5"])
def test_masked_equals_shrunk_with_hidden_dimensions(kind: str) -> None:
    assert has_hidden_table(kind)
    model, batch = patched(kind, prune=True), tiny_batch(kind)
    plan = random_plan(model, hidden=True, seed=5)
    set_masks(model, plan)
    masked = run(model, batch).logits
    opened = context_of(model).gates()
    apply_prune_plan(model, plan)
    close("shrunk", run(model, batch).logits, masked)
    assert len(opened.unique(dim=0)) > 1
    assert torch.equal(context_of(model).gates(), opened)
    assert model.apt_gates.read.in_features == len(plan.kept["hidden"]) < 32


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_compute_their_gates_anew(reentrant: bool) -> None:
    found = []
    for checkpointing in (False, True):
        model = patched("bert", lora_dropout=0.0).train()
        model.enable_input_require_grads()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(8)
        loss = model(**tiny_batch("bert")).loss
        with torch.no_grad():
            model.eval()(**tiny_batch("bert", size=3, seed=9))  # a pass in between, as a teacher's
            model.train()
        loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert any(name.startswith(ROW_GATES) for name in found[0])
    for name, gradient in found[0].items():
        close(name, found[1][name], gradient)


def test_open_gates_are_penalised_and_counted() -> None:
    model, batch = patched("bert", l0_weight=0.5), tiny_batch("bert")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    loop = apt.Controller(model, optimizer, 10)
    loss = model(**batch).loss
    logits = model.apt_gates(examples_of(model).context)
    penalty = loop.loss(loss, batch)
    close("penalty", penalty - loss, 0.5 * torch.sigmoid(logits).sum(1).mean())
    penalty.backward()
    assert model.apt_gates.read.weight.grad.abs().max() > 0
    assert apt.summary(patched("bert")).active["bert.encoder.layer.1.attention.self.query"] == 0.0
    counts = apt.summary(model)
    mean = float((logits > 0).sum() / len(logits))
    assert set(counts.active) == set(counts.ranks)
    assert all(abs(active - mean) < 1e-9 for active in counts.active.values())
    assert 0 < mean < RANK


@pytest.mark.parametrize(("kind", "prune"), [("bert", True), ("gpt2", False), ("llama_gqa", True)])
def test_an_export_keeps_the_gates(kind: str, prune: bool, tmp_path: Path) -> None:
    model, batch = patched(kind, prune=prune), tiny_batch(kind)
    if prune:
        apply_prune_plan(model, random_plan(model, empty=("layers.1.neurons",), hidden=True, seed=3))
    before = run(model, batch).logits
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.apt_gates.open.bias.add_(10.0)
    assert (run(twin, batch).logits - before).abs().max() > 1e-3  # the copy has gates of its own
    apt.export_model(model, tmp_path / "small")
    close("export", run(apt.load_model(tmp_path / "small"), batch).logits, before)
    if kind != "bert":  # of a model in no variable too, and with the prompt that is marked
        ids = batch["input_ids"][:, :4]
        said = apt.load_model(tmp_path / "small").generate(ids, max_new_tokens=4)  # type: ignore[operator]
        assert torch.equal(said, model.generate(ids, max_new_tokens=4))
    assert '"stock": false' in (tmp_path / "small" / "apt_export.json").read_text()
    (tmp_path / "small" / "apt_gates.safetensors").unlink()
    with pytest.raises(ValueError, match=r"apt_gates\.safetensors is missing"):
        apt.load_model(tmp_path / "small")


def test_what_cannot_be_says_what_can(tmp_path: Path) -> None:
    model, batch = patched("bert"), tiny_batch("bert")
    with pytest.raises(ValueError, match=r"keep the model patched, or save it with apt\.export_model"):
        apt.unpatch_model(model, merge=True)
    with pytest.raises(ValueError, match=r"LoRA file cannot say; use apt\.export_model"):
        apt.save_adapter(model, tmp_path / "a")
    with pytest.raises(ValueError, match=r"context_layer 2 leaves no layer above it .* use at most 1"):
        patched("bert", context_layer=2)
    with pytest.raises(ValueError, match="no target lies above layer 1"):
        patched("bert", context_layer=1, target_modules=("bert.encoder.layer.0.output.dense",))
    with pytest.raises(ValueError, match="context must be one of"):
        patched("bert", context="last")
    plain = apt.unpatch_model(model)
    close("base", run(plain, batch).logits, run(tiny_model("bert"), batch).logits)
    assert not hasattr(plain, ROW_GATES)
    decoder = apt.unpatch_model(patched("llama_gqa"))
    assert given_to(decoder, "generate") is None


@pytest.mark.parametrize("kind", ["bert", "llama_gqa"])
def test_it_is_distilled_from_gates_of_its_own(kind: str) -> None:
    model = patched(kind, prune=True).train()
    settings = {"target_sparsity": 0.3, "use_self_distillation": True, "distill_end": 0.9}
    loop = Loop(kind, model, total_steps=20, **settings, **BRIEF).take(20)
    assert sum(event.prune is not None for event in loop.run.events) == 3
