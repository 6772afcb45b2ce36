"""The outlier term of salience: scipy on each true head and neuron, the authors' code, and what a run makes of it."""

from typing import Any

import pytest
import torch
from check import close
from own_loop import BRIEF, ONCE, Loop, equal_bits, patched
from scipy.stats import kurtosis as scipy_kurtosis
from tiny_models import fill_adapters, tiny_batch, tiny_model
from torch import Tensor

import apt
import apt_kernels
from apt.families import anatomy_of
from apt.pruning.salience import KURTOSES, OutlierTerm, unit_scores
from apt.pruning.units import UnitGroup, find_units

WIDE = torch.float64
Scores = dict[str, Tensor]


def after_backward(
    name: str, mode: str, roles: tuple[str, ...] = ("q", "v"), recompute: bool = False, tails: bool = True
) -> tuple[OutlierTerm, list[UnitGroup], Scores, Scores]:
    """A model after one backward pass: its groups, their saliences, and the mean input of each over valid tokens."""
    model: Any = fill_adapters(apt.patch_model(tiny_model(name), rank=2, target_modules=roles))
    groups, term, batch = find_units(anatomy_of(model)), OutlierTerm(mode), tiny_batch(name)
    inputs: Scores = {}
    for group in groups:
        gate = group.mask
        gate.sums, gate.total, gate.count = gate.sums.to(WIDE), gate.total.to(WIDE), gate.count.to(WIDE)
        gate.collecting, gate.totals = True, term.needs_total(group)
        gate.register_forward_hook(lambda g, x, y, key=group.name: inputs.update({key: x[0].detach()}))
        if tails:  # kurtosis well above 0 here and there
            group.reader.weight.data.pow_(3).mul_(10)
    if recompute:
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
    model(**batch).loss.backward()
    means = {name: x[batch["attention_mask"].bool()].mean(0) for name, x in inputs.items()}
    return term, groups, {group.name: unit_scores(group) for group in groups}, means


def by_scipy(group: UnitGroup, mean: Tensor) -> Tensor:
    weight = group.reader.weight.detach().clone()
    if group.reader.rank:
        weight += group.reader.scale * group.reader.lora_B.detach() @ group.reader.lora_A.detach()
    units = (weight * mean).split(group.mask.unit_size, dim=1)
    return torch.tensor([scipy_kurtosis(unit.flatten().numpy()) for unit in units], dtype=WIDE)


@pytest.mark.parametrize("roles", [("q", "v"), ("q", "o", "down")], ids=["frozen", "adapted"])
@pytest.mark.parametrize("name", ["bert", "llama", "llama_gqa", "qwen3"])
def test_paper_adds_scipys_kurtosis_of_every_head_and_neuron(name: str, roles: tuple[str, ...]) -> None:
    term, groups, scores, means = after_backward(name, "paper", roles)
    got, tokens = term.add(groups, scores), int(tiny_batch(name)["attention_mask"].sum())
    assert got.keys() == scores.keys()
    for group in groups:
        added = by_scipy(group, means[group.name]).clamp(min=0).sqrt()
        assert added.max() > 1
        # eq. 4 has no division by the tokens: times them, it is the paper's sum
        close(group.name, got[group.name] * tokens, scores[group.name] * tokens + added)


def authors_kurtosis(x: Tensor) -> Tensor:
    """utils/minus_utils.py of the authors' code, over axis 0."""
    z = (x - x.mean(0)) / x.std(0)
    return (z**4).mean(0) - 3.0


@pytest.mark.parametrize("roles", [("q", "v"), ("q", "o", "down")], ids=["frozen", "adapted"])
def test_original_is_the_authors_code(roles: tuple[str, ...]) -> None:
    term, groups, scores, means = after_backward("llama", "original", roles)
    got, tokens = term.add(groups, scores), int(tiny_batch("llama")["attention_mask"].sum())
    for group in groups:
        O, H = group.reader.merged_weight() * means[group.name], group.num_units
        if group.kind == "head":
            O = O.view(O.shape[0], H, -1).permute(1, 2, 0).reshape(-1, H)
        close(
            group.name, got[group.name] * tokens, scores[group.name] * tokens + authors_kurtosis(O).clamp(min=0).sqrt()
        )


def test_paper_finds_the_head_with_a_heavy_tail_and_original_does_not() -> None:
    for mode, found in (("paper", True), ("original", False)):
        term, groups, scores, _ = after_backward("llama", mode, tails=False)
        heads = groups[2]
        size = heads.mask.unit_size
        heads.mask.total.fill_(1.0)
        heads.reader.weight.data[:, size : 2 * size].pow_(9).mul_(1e6)
        added = term.add(groups, scores)[heads.name] - scores[heads.name]
        others = added[[0, 2, 3]].max()
        assert bool(added[1] > 3 * others) is found, mode


def test_normalized_weighs_both_terms_alike() -> None:
    term, groups, scores, means = after_backward("llama_gqa", "normalized")
    got = term.add(groups, scores)
    for kind in ("head", "neuron"):
        mine = [group for group in groups if group.kind == kind]
        outliers = torch.cat([by_scipy(group, means[group.name]).clamp(min=0).sqrt() for group in mine])
        salience = torch.cat([scores[group.name] for group in mine])
        wanted = salience.mean() * (salience / salience.mean() + outliers / outliers.mean())
        close(kind, torch.cat([got[group.name] for group in mine]), wanted)


def test_light_tails_add_nothing() -> None:
    for mode in KURTOSES:
        term, groups, scores, _ = after_backward("llama", mode, tails=False)
        for group in groups:
            group.reader.weight.data.sign_()  # two values: kurtosis -2
            group.mask.total.fill_(1.0)
        added = term.add(groups, scores)
        assert all(torch.equal(added[name], scores[name]) for name in scores), mode


def test_recomputed_layers_count_once() -> None:
    plain, again = (after_backward("llama", "paper", recompute=recompute)[1] for recompute in (False, True))
    for one, other in zip(plain, again, strict=True):
        close(one.name, other.mask.total, one.mask.total)
        assert bool(one.mask.total.any()) == (one.kind == "head")


@pytest.mark.parametrize(("roles", "second"), [(("q", "v"), 3), (("q", "o", "down"), 6)], ids=["frozen", "adapted"])
def test_what_no_step_changes_is_computed_once(roles: tuple[str, ...], second: int) -> None:
    """3 layers: heads read the data of the step, neurons only the weights."""
    term, groups, scores, _ = after_backward("llama", "paper", roles)
    for calls in (6, second):
        apt_kernels.reset_calls()
        last = term.add(groups, scores)
        assert sum(apt_kernels.calls()["weight_kurtosis"].values()) == calls
    groups[1].reader.weight.data[0] *= 50
    term.reset()
    assert (term.add(groups, scores)["layers.0.neurons"] > last["layers.0.neurons"] + 0.003).any()


@pytest.mark.parametrize(("name", "mode"), [("bert", "off"), ("llama", "paper"), ("llama_cls", "paper")])
def test_a_family_has_its_default(name: str, mode: str) -> None:
    run = Loop(name, patched(name), 30, **BRIEF).run
    assert run.pruning.units.outliers.mode == mode
    assert {group.kind for group in run.groups if group.mask.totals} == ({"head"} if mode == "paper" else set())


def test_off_is_the_default_of_encoders_bit_for_bit() -> None:
    runs = [
        Loop("bert", patched("bert"), 30, target_sparsity=0.5, **BRIEF, **given).take(20)
        for given in ({}, {"kurtosis": "off"}, {"kurtosis": "paper"})
    ]
    assert equal_bits(runs[0].model, runs[1].model)
    assert runs[0].run.events[-1].prune != runs[2].run.events[-1].prune


@pytest.mark.parametrize("mode", KURTOSES)
@pytest.mark.parametrize("name", ["bert", "llama_gqa"])
def test_a_run_reaches_its_target(name: str, mode: str) -> None:
    loop = Loop(name, patched(name), 30, target_sparsity=0.5, kurtosis=mode, verify_events=True, **BRIEF).take(30)
    assert 0.5 <= apt.summary(loop.model).sparsity <= 0.6
    assert len(loop.run.events) == 3


def test_a_neuron_with_a_heavy_tail_outlives_its_salience() -> None:
    for mode in ("off", "paper"):
        model = patched("llama")
        down = model.model.layers[1].mlp.down_proj
        down.weight.data[:, 7] = 0.0
        down.weight.data[3, 7] = 1e-4  # hardly any activation reaches the loss, and the tail could not be heavier
        run = Loop("llama", model, 40, target_sparsity=0.7, kurtosis=mode, **ONCE).take(20).run
        assert (7 in run.events[0].prune.kept["layers.1.neurons"]) is (mode == "paper")


def test_modes_have_names() -> None:
    with pytest.raises(ValueError, match=r"pruning: kurtosis must be one of \[None, 'off', .*\], got 'on'"):
        apt.APTConfig().with_overrides(kurtosis="on")
