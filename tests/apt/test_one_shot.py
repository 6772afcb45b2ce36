"""Pruning at once before tuning: static scores against a plain model, the cut, and what comes after it."""

import copy
from typing import Any

import pytest
import torch
from check import close
from own_loop import Loop, equal_bits, patched
from tiny_models import fill_adapters, tiny_batch, tiny_model
from torch import Tensor, nn

import apt
from apt.families import anatomy_of
from apt.layers import adapted
from apt.pruning.salience import unit_scores
from apt.pruning.units import find_units
from apt.surgery.prune import apply_prune_plan
from apt.training.controller.calibration import static_scores

AT_ONCE: dict[str, Any] = {"prune_before_tuning": True, "target_sparsity": 0.4, "round_to": 1, "kurtosis": "off"}
READERS = {"bert": ("attention.output.dense", "output.dense"), "llama_gqa": ("self_attn.o_proj", "mlp.down_proj")}


def batches(name: str, count: int = 3) -> list[dict[str, Tensor]]:
    return [tiny_batch(name, seed=seed) for seed in range(count)]


def by_hand(name: str, count: int = 3) -> dict[str, Tensor]:
    """Sum over batches of mean|h| * sum|dL/dh| of valid tokens, per feature, from an unpatched model."""
    model = tiny_model(name).train()
    model.requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_(True)  # so that gradients reach every activation
    layers = model.bert.encoder.layer if name == "bert" else model.model.layers
    seen: dict[str, Tensor] = {}

    def hook(key: str) -> Any:
        def keep(module: nn.Module, args: tuple[Tensor]) -> None:
            args[0].retain_grad()
            seen[key] = args[0]

        return keep

    for index, layer in enumerate(layers):
        for kind, path in zip(("heads", "neurons"), READERS[name], strict=True):
            layer.get_submodule(path).register_forward_pre_hook(hook(f"layers.{index}.{kind}"))
    total: dict[str, Tensor] = {}
    for batch in batches(name, count):
        model(**batch).loss.backward()
        valid = batch["attention_mask"][..., None]
        for key, h in seen.items():
            assert h.grad is not None
            score = (h * valid).abs().sum((0, 1)) * (h.grad * valid).abs().sum((0, 1)) / valid.sum()
            total[key] = total.get(key, 0.0) + score.detach()
    return total


@pytest.mark.parametrize("targets", [["q", "v"], ["down"]], ids=["q and v", "down alone"])
@pytest.mark.parametrize("name", ["bert", "llama_gqa"])
def test_static_scores_are_those_of_a_plain_model(name: str, targets: list[str]) -> None:
    """With B = 0 and most of the model frozen, statistics are still right, also before the first adapter."""
    model = patched(name, target_modules=targets)
    run = apt.Controller(model, torch.optim.AdamW(model.parameters()), 30, **AT_ONCE)
    run.pruning.units.collect(True)
    found = static_scores(model, batches(name), run.pruning.units.take)
    wanted = by_hand(name)
    assert found.keys() == wanted.keys()
    for group in run.groups:
        units = wanted[group.name].view(group.num_units, -1).sum(1)
        close(group.name, found[group.name], units.float())


@pytest.mark.parametrize("salience", ["product_of_sums", "gate_taylor", "magnitude"])
@pytest.mark.parametrize("name", ["bert", "llama_gqa"])
def test_the_cut_is_all_that_calibration_does(name: str, salience: str) -> None:
    start = patched(name, dropout=0.1 if name == "bert" else 0.0)
    start.eval()
    loop = Loop(name, copy.deepcopy(start), 30, **AT_ONCE, salience=salience, verify_events=True)
    random_state = torch.get_rng_state()
    loop.run.prune_before_tuning(batches(name))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not loop.model.training
    assert all(p.grad is None for p in loop.model.parameters())
    event = loop.run.events[0]
    assert (event.step, event.rank, loop.run.step) == (0, None, 0)
    assert 0.4 <= apt.summary(loop.model).sparsity == event.sparsity < 0.45
    assert event.prune is not None
    apply_prune_plan(start, event.prune)
    assert equal_bits(loop.model, start)
    assert not any(group.mask.collecting or group.mask.masked for group in loop.run.groups)


def test_tuning_after_the_cut_only_grows_ranks() -> None:
    loop = Loop("llama_gqa", patched("llama_gqa"), 30, num_events=3, prune_end=0.6, max_rank=999, **AT_ONCE)
    loop.run.prune_before_tuning(batches("llama_gqa"))
    left = sum(m.rank * (m.n_in + m.n_out) for _, m in adapted(loop.model) if m.rank)
    loop.take(20)
    assert [(e.step, e.prune is None) for e in loop.run.events] == [(0, False), (6, True), (12, True), (18, True)]
    assert [e.rank.budget for e in loop.run.events[1:]] == [2 * left, 3 * left, 4 * left]
    assert {e.sparsity for e in loop.run.events} == {apt.summary(loop.model).sparsity}
    assert {e.target_sparsity for e in loop.run.events} == {0.4}
    assert not loop.run.active


def test_only_so_many_batches_are_taken() -> None:
    plans = []
    for given, taken in ((2, 7), (7, 2), (7, 7)):
        loop = Loop("bert", patched("bert"), 30, calibration_batches=taken, **AT_ONCE)
        loop.run.prune_before_tuning(iter(batches("bert", given)))
        plans.append(loop.run.events[0].prune.kept)
    assert plans[0] == plans[1] != plans[2]


def test_kurtosis_joins_the_static_scores() -> None:
    """The default of decoders."""
    plans = {}
    for kurtosis in ("off", "paper", None):
        loop = Loop("llama", patched("llama"), 30, **{**AT_ONCE, "kurtosis": kurtosis})
        loop.run.prune_before_tuning(batches("llama"))
        plans[kurtosis] = loop.run.events[0].prune.kept
    assert plans["off"] != plans["paper"] == plans[None]


def norms_by_hand(model: nn.Module, names: dict[str, tuple[str, ...]], layer: Any, size: int) -> Tensor:
    """Per unit the sum of |w|, from whole merged weights and biases."""
    total = torch.zeros(())
    for axis, paths in names.items():
        for path in paths:
            linear = layer.get_submodule(path)
            weight = linear.weight + (linear.scale * linear.lora_B @ linear.lora_A if linear.rank else 0.0)
            sums = weight.detach().abs().sum(1 if axis == "rows" else 0)
            if axis == "rows" and linear.bias is not None:
                sums = sums + linear.bias.abs()
            total = total + sums.view(size, -1).sum(1)
    return total


@pytest.mark.parametrize("name", ["bert", "llama_gqa", "llama_bias"])
def test_magnitude_is_the_mean_weight_of_a_unit(name: str) -> None:
    model = fill_adapters(patched(name))
    layer = model.bert.encoder.layer[1] if name == "bert" else model.model.layers[1]
    inside = {
        "bert": (("attention.self.query", "attention.self.key", "attention.self.value"), ("intermediate.dense",)),
        "llama": (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")),
    }["bert" if name == "bert" else "llama"]
    groups = {group.name: group for group in find_units(anatomy_of(model))}
    for kind, rows, column in zip(
        ("heads", "neurons"), inside, READERS["bert" if name == "bert" else "llama_gqa"], strict=True
    ):
        group = groups[f"layers.1.{kind}"]
        wanted = norms_by_hand(model, {"rows": rows, "columns": (column,)}, layer, group.num_units)
        close(kind, unit_scores(group, salience="magnitude"), wanted)


def test_magnitude_asks_for_no_batch_and_opens_no_gate() -> None:
    plans = []
    for given in ([], batches("bert")):
        loop = Loop("bert", patched("bert"), 30, salience="magnitude", **AT_ONCE)
        loop.run.prune_before_tuning(given)
        plans.append(loop.run.events[0].prune)
    assert plans[0] == plans[1]
    during = Loop("bert", patched("bert"), 40, salience="magnitude", target_sparsity=0.5, num_events=2, round_to=1)
    during.take(1)
    assert not any(group.mask.collecting for group in during.run.groups)
    during.take(39)
    assert 0.5 <= apt.summary(during.model).sparsity < 0.55


class Scaler:
    """A gradient scaler whose first factor overflows float16."""

    def get_scale(self) -> float:
        return 2.0**20


def test_a_factor_that_overflows_is_halved_until_it_does_not() -> None:
    plans = []
    for scaler in (None, Scaler()):
        loop = Loop("llama", patched("llama"), 30, scaler=scaler, **AT_ONCE)
        # The gradient comes back through float16, whose largest number is below 2^16.
        loop.run.prune_before_tuning(batches("llama"), lambda model, batch: model(**batch).loss.half().double())
        plans.append(loop.run.events[0].prune)
    assert plans[0] == plans[1]


def test_a_batch_that_is_no_number_is_told_by_its_place() -> None:
    loop = Loop("llama", patched("llama"), 30, **AT_ONCE)
    with torch.no_grad():
        loop.model.model.embed_tokens.weight[59] = float("nan")
    bad = tiny_batch("llama")
    bad["input_ids"][0, 0] = 59
    good = {**bad, "input_ids": bad["input_ids"].clamp(max=58), "labels": bad["labels"].clamp(max=58)}
    with pytest.raises(FloatingPointError, match=r"batch 2, with a loss of nan, gives layers\.0\.heads a salience"):
        loop.run.prune_before_tuning([good, bad])
    assert all(module.training for module in loop.model.modules())


def test_it_comes_once_before_the_first_step_where_it_was_asked_for() -> None:
    words = "prune_before_tuning comes once, before step 1, with the settings prune_before_tuning=True"
    with pytest.raises(ValueError, match=words):
        Loop("bert", patched("bert"), 30).run.prune_before_tuning(batches("bert"))
    loop = Loop("bert", patched("bert"), 30, **AT_ONCE)
    with pytest.raises(ValueError, match=r"call prune_before_tuning\(batches\) before step 1"):
        loop.take(1)
    with pytest.raises(ValueError, match="there is no batch to score units on"):
        loop.run.prune_before_tuning([])
    without = [{key: value for key, value in batch.items() if key != "labels"} for batch in batches("bert")]
    with pytest.raises(ValueError, match="the model gave no loss; put labels into the batches, or give compute_loss"):
        loop.run.prune_before_tuning(without)
    loop.run.prune_before_tuning(without, lambda model, batch: model(**batch).logits.square().mean())
    with pytest.raises(ValueError, match="at step 0 with 1 events it cannot"):
        loop.run.prune_before_tuning(batches("bert"))
    nothing = Loop("bert", patched("bert"), 30, **{**AT_ONCE, "target_sparsity": 0.0}).take(1)
    assert not nothing.run.awaits_calibration
