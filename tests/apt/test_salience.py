"""Scores against brute force: units from the tensors themselves, adapters by hand."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from check import close
from tiny_models import MODELS, fill_adapters, tiny_batch, tiny_model
from torch import Tensor, nn

import apt
from apt.apt_config import APTConfig
from apt.families import anatomy_of
from apt.layers import APTAdapter
from apt.layers.passes import remove_passes
from apt.layers.unit_mask import UnitMask
from apt.pruning import UnitScores
from apt.pruning.salience import SALIENCES, SQUARES, MovingAverage, adapter_importance, unit_scores
from apt.pruning.units import UnitGroup, find_units

WIDE = torch.float64
COLLECTED = [name for name in SALIENCES if name != "magnitude"]  # from activations and gradients


def collecting(name: str, salience: str = "product_of_sums") -> tuple[Any, list[UnitGroup]]:
    """A model whose gates collect, in float64 as the rest."""
    model = fill_adapters(apt.patch_model(tiny_model(name), rank=2))
    groups = find_units(anatomy_of(model))
    for group in groups:
        group.mask.sums = group.mask.sums.to(WIDE)
        group.mask.count = group.mask.count.to(WIDE)
        group.mask.collecting = True
        group.mask.products = salience in ("sum_of_products", "gate_taylor")
        group.mask.squares = salience in SQUARES
    return model, groups


OF_UNIT = {  # from h and dL/dy of one unit, [valid tokens, features]
    "product_of_sums": lambda h, g: (h.abs().mean(0) * g.abs().sum(0)).sum(),
    "sum_of_products": lambda h, g: (h * g).abs().sum(),
    "gate_taylor": lambda h, g: (h * g).sum().abs(),
    "fisher": lambda h, g: ((h.T @ h) * (g.T @ g)).sum(),
    "obs": lambda h, g: len(g) * (g.T @ g).squeeze(),  # the half of it that is of gradients
}


def brute_force(
    model: Any, groups: list[UnitGroup], batch: dict[str, Tensor], salience: str = "product_of_sums"
) -> dict[str, Tensor]:
    """Scores from the tensors before and behind each gate, unit by unit."""
    seen: dict[UnitMask, tuple[Tensor, Tensor]] = {}

    def keep(gate: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        output.retain_grad()
        seen[gate] = (inputs[0].detach(), output)  # type: ignore[index]

    hooks = [group.mask.register_forward_hook(keep) for group in groups]
    model(**batch).loss.backward()
    for hook in hooks:
        hook.remove()
    scores = {}
    for group in groups:
        h, y = seen[group.mask]
        valid = batch["attention_mask"].bool()
        if group.name.startswith("decoder."):
            valid = batch.get("decoder_attention_mask", batch["labels"] != -100).bool()
        valid = valid.reshape(h.shape[:-1])  # OPT's FFN sees [B * S, D]
        units = []
        for unit in range(group.num_units):
            features = slice(unit * group.mask.unit_size, (unit + 1) * group.mask.unit_size)
            units.append(OF_UNIT[salience](h[valid][:, features], y.grad[valid][:, features]))
        scores[group.name] = torch.stack(units)
    return scores


@pytest.mark.parametrize("salience", COLLECTED)
@pytest.mark.parametrize("masked", [False, True], ids=["open", "masks on their way"])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "llama"])
def test_unit_scores_equal_brute_force_without_padding(name: str, masked: bool, salience: str) -> None:
    model, groups = collecting(name, salience)
    if masked:
        for group in groups:
            group.mask.set_mask(torch.randint(0, 3, (group.num_units,)) / 2)
    wanted = brute_force(model, groups, tiny_batch(name), salience)
    for group in groups:
        close(group.name, unit_scores(group, salience=salience), wanted[group.name])
    assert min(scores.max() for scores in wanted.values()) > 1e-6


@pytest.mark.parametrize("masked", [False, True], ids=["open", "masks on their way"])
@pytest.mark.parametrize("name", ["bert", "llama_cls"])
def test_gate_taylor_is_the_slope_of_the_loss_in_the_mask(name: str, masked: bool) -> None:
    """Against a mask that autograd sees. (Padding reaches no loss of a classifier.)"""
    model, groups = collecting(name, "gate_taylor")
    gates = {group.mask: torch.randint(0, 3, (group.num_units,)) / 2 for group in groups}
    if masked:
        for gate, mask in gates.items():
            gate.set_mask(mask)
    model(**tiny_batch(name)).loss.backward()
    scores = {group.mask: unit_scores(group, salience="gate_taylor") for group in groups}
    leaves = {gate: gate.values.to(WIDE).clone().requires_grad_() for gate in gates}
    for gate in gates:
        gate.collecting = False
        gate.set_mask(torch.ones(gate.num_units))
        gate.register_forward_hook(lambda g, _, y: y * leaves[g].repeat_interleave(g.unit_size))
    model(**tiny_batch(name)).loss.backward()
    for gate, leaf in leaves.items():
        close("slope", scores[gate], leaf.grad.abs())


def test_each_salience_bounds_the_next() -> None:
    """|sum h g| <= sum |h g| <= sum |h| sum |g|."""
    found = []
    for salience in ("gate_taylor", "sum_of_products", "product_of_sums"):
        model, groups = collecting("bert", salience)
        model(**tiny_batch("bert")).loss.backward()
        scale = 1.0 if groups[0].mask.products else 1.0 / groups[0].mask.count.item()  # a mean stands in the last one
        found.append(torch.cat([unit_scores(group, scale, salience) for group in groups]))
    for lower, upper in pairwise(found):
        assert (lower <= upper * (1 + 1e-9)).all()
        assert (lower < 0.9 * upper).any()


@pytest.mark.parametrize("salience", COLLECTED)
@pytest.mark.parametrize("name", ["bert", "llama_gqa"])
def test_units_before_the_first_adapter_are_scored_alike(name: str, salience: str) -> None:
    """Nothing that trains stands before the first gate; embeddings that ask for a gradient say what it should find."""
    model = fill_adapters(apt.patch_model(tiny_model(name), rank=2, target_modules=["o", "down"]))
    groups = find_units(anatomy_of(model))
    for group in groups:
        group.mask.sums, group.mask.count = group.mask.sums.to(WIDE), group.mask.count.to(WIDE)
    embeddings = model.get_input_embeddings().requires_grad_(True)
    wanted = brute_force(model, groups, tiny_batch(name), salience)
    adapters = {key: p.grad for key, p in model.named_parameters() if "lora" in key}
    embeddings.requires_grad_(False)
    model.zero_grad()
    for group in groups:
        group.mask.collecting, group.mask.squares = True, salience in SQUARES
        group.mask.products = salience in ("sum_of_products", "gate_taylor")
    model(**tiny_batch(name)).loss.backward()
    for group in groups:
        assert wanted[group.name].max() > 1e-6
        close(group.name, unit_scores(group, salience=salience), wanted[group.name])
    for key, p in model.named_parameters():
        if "lora" in key:
            close(key, p.grad, adapters[key])


def test_padding_would_count() -> None:
    """The batch above can tell: with every token taken for real, the scores differ."""
    model, groups = collecting("llama_gqa")
    batch = tiny_batch("llama_gqa")
    brute_force(model, groups, batch)
    padded = {group.name: unit_scores(group) for group in groups}
    model, groups = collecting("llama_gqa")
    remove_passes(model)  # nobody says which tokens are real
    brute_force(model, groups, batch)
    assert all((unit_scores(group) - padded[group.name]).abs().max() > 1e-6 for group in groups)


def test_the_padding_mask_may_come_by_position() -> None:
    batch, found = tiny_batch("bert"), []
    for given in ({}, {"attention_mask": batch["attention_mask"]}):
        model, groups = collecting("bert")
        positions = () if given else (batch["attention_mask"],)
        model(batch["input_ids"], *positions, labels=batch["labels"], **given).loss.backward()
        found.append(torch.cat([unit_scores(group) for group in groups]))
    assert torch.equal(*found)


@pytest.mark.parametrize("salience", COLLECTED)
def test_recomputed_layers_count_once(salience: str) -> None:
    found = []
    for recompute in (False, True):
        model, groups = collecting("bert", salience)
        model.train()
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**tiny_batch("bert")).loss.backward()
        found.append(torch.cat([unit_scores(group, salience=salience).flatten() for group in groups]))
    close("recomputed", found[1], found[0])


def pieces(batch: dict[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    return [{key: value[i : i + size] for key, value in batch.items()} for i in range(0, len(batch["labels"]), size)]


@pytest.mark.parametrize("salience", COLLECTED)
@pytest.mark.parametrize("size", [1, 2], ids=["4 x 1", "2 x 2"])
def test_scores_do_not_depend_on_micro_batching(size: int, salience: str) -> None:
    """Loss over k, one backward each, scores once at the end: as one batch. (The product is not additive.)"""
    batch = tiny_batch("roberta")
    model, groups = collecting("roberta", salience)
    model(**batch).loss.backward()
    whole = {group.name: unit_scores(group, salience=salience) for group in groups}
    model, groups = collecting("roberta", salience)
    parts = pieces(batch, size)
    for part in parts:
        (model(**part).loss / len(parts)).backward()
    for group in groups:
        close(group.name, unit_scores(group, salience=salience), whole[group.name])


@pytest.mark.parametrize("salience", COLLECTED)
def test_scores_do_not_depend_on_the_batch_size(salience: str) -> None:
    """Of a mean loss: each sentence twice is the same evidence."""
    batch = tiny_batch("bert")
    twice = {key: torch.cat([value, value]) for key, value in batch.items()}
    found = []
    for given in (batch, twice):
        model, groups = collecting("bert", salience)
        model(**given).loss.backward()
        found.append(torch.cat([unit_scores(group, salience=salience).flatten() for group in groups]))
    close("twice", found[1], found[0])


@pytest.mark.parametrize("salience", COLLECTED)
def test_scores_are_divided_by_the_loss_scale(salience: str) -> None:
    batch = tiny_batch("bert")
    model, groups = collecting("bert", salience)
    model(**batch).loss.backward()
    plain = [unit_scores(group, salience=salience) for group in groups]
    model, groups = collecting("bert", salience)
    (model(**batch).loss * 1024).backward()
    for group, wanted in zip(groups, plain, strict=True):
        close(group.name, unit_scores(group, 1024.0, salience), wanted)


def test_squares_count_as_many_tokens_in_every_stack() -> None:
    """T5 reads more tokens than it writes; that alone makes no unit of its encoder worth more."""
    model, groups = collecting("t5", "fisher")
    model(**tiny_batch("t5")).loss.backward()
    plain = {group.name: unit_scores(group, salience="fisher") for group in groups}
    counts = {group.name: float(group.mask.count) for group in groups}
    units = UnitScores(anatomy_of(model), APTConfig().with_overrides(salience="fisher", kurtosis="off").pruning)
    found = units.take()
    assert len(set(counts.values())) == 2
    for name, score in plain.items():
        close(name, found[name], score * (max(counts.values()) / counts[name]))


def test_no_token_gives_no_score() -> None:
    _, groups = collecting("bert")
    assert all(not unit_scores(group).any() for group in groups)


def test_adapter_importance_by_hand() -> None:
    adapter = APTAdapter(nn.Linear(4, 3), rank=2).to(WIDE)
    assert adapter_importance(adapter) == 0  # no gradient yet
    with torch.no_grad():
        adapter.lora_B.copy_(torch.tensor([[1.0, -2.0], [3.0, 0.5], [0.0, 4.0]]))
    adapter.lora_B.grad = torch.tensor([[2.0, 1.0], [-1.0, 2.0], [5.0, -0.5]], dtype=WIDE)
    by_rank = [1 * 2 + 3 * -1 + 0, -2 * 1 + 0.5 * 2 + 4 * -0.5]  # -1 and -3: signed inside a rank
    assert adapter_importance(adapter) == abs(by_rank[0]) + abs(by_rank[1])
    assert adapter_importance(adapter, 4.0) == 1.0
    assert adapter_importance(adapter, kind="elementwise") == 2 + 3 + 0 + 2 + 1 + 2
    assert adapter_importance(adapter, 4.0, "elementwise") == 2.5


def test_importance_of_a_and_of_b_is_one_number() -> None:
    """Signed sums inside a rank are the same for both factors, which is why B alone is read."""
    model = fill_adapters(apt.patch_model(tiny_model("bert"), rank=3))
    model(**tiny_batch("bert")).loss.backward()
    for name, adapter in model.named_modules():
        if isinstance(adapter, APTAdapter) and adapter.rank:
            of_a = (adapter.lora_A * adapter.lora_A.grad).sum(1).abs().sum()
            close(name, adapter_importance(adapter), of_a.detach())


def test_moving_average() -> None:
    average = MovingAverage(0.85)
    old = torch.zeros(3, dtype=WIDE)
    for new in torch.rand(4, 3, dtype=WIDE):
        average.update({"unit": new})
        old = 0.85 * old + 0.15 * new
        close("average", average.values["unit"], old)
    average.keep("unit", torch.tensor([0, 2]))
    average.keep("absent", torch.tensor([0]))
    close("kept", average.values["unit"], old[[0, 2]])
    average.reset()
    assert average.values == {}
