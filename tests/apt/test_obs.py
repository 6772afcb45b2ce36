"""Salience "obs": what of a unit the others cannot give, against plain regression, and in a cut."""

import math
from typing import Any

import pytest
import torch
from own_loop import patched
from tiny_models import NAMES, tiny_batch, tiny_model
from torch import Tensor

import apt
from apt.apt_config import APTConfig
from apt.repair.solve import USUAL, Moment
from apt.repair.unexplained import Unexplained

UNITS = 6


def features(size: int, tokens: int = 400) -> Tensor:
    draw = torch.Generator().manual_seed(size)
    mixed = torch.randn(UNITS * size, UNITS * size, generator=draw, dtype=torch.float64)
    return torch.randn(tokens, UNITS * size, generator=draw, dtype=torch.float64) @ mixed + 0.3


def moment_of(x: Tensor) -> Moment:
    moment = Moment.zeros(x.shape[1], x.device, x.dtype)
    moment.add(x)
    return moment


def regressed(x: Tensor, mine: list[int], others: list[int], *, centred: bool) -> Tensor:
    """Second moment of what ridge regression on the other features leaves of mine, ridge included: ``[d, d]``."""
    x = x - x.mean(0) if centred else x
    second = x.T @ x / len(x)
    second += USUAL * second.diagonal().mean() * torch.eye(len(second), dtype=x.dtype)
    across = second[mine][:, others]
    return second[mine][:, mine] - across @ torch.linalg.solve(second[others][:, others], across.T)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("size", [1, 3])
def test_it_is_what_regression_on_the_open_units_leaves(size: int, with_bias: bool) -> None:
    x = features(size)
    draw = torch.Generator().manual_seed(9)
    roots = torch.randn(UNITS, size, size, generator=draw, dtype=torch.float64)
    gradients = roots @ roots.transpose(1, 2)
    left = Unexplained.of(moment_of(x), size, with_bias=with_bias)
    for kept in ([0, 1, 2, 3, 4, 5], [0, 2, 3, 5], [2, 5]):
        left.keep(kept)
        found = left.scores(gradients.flatten() if size == 1 else gradients)
        for unit in range(UNITS):
            mine = list(range(unit * size, (unit + 1) * size))
            others = [f for k in kept if k != unit for f in range(k * size, (k + 1) * size)]
            wanted = (regressed(x, mine, others, centred=with_bias) * gradients[unit]).sum() if unit in kept else 0.0
            torch.testing.assert_close(found[unit], torch.as_tensor(wanted, dtype=torch.float64))


def test_of_two_units_that_tell_the_same_one_counts_once_the_other_is_gone() -> None:
    x = features(1)
    x[:, 1] = x[:, 0]
    left = Unexplained.of(moment_of(x), 1, with_bias=False)
    both = left.scores(torch.ones(UNITS))
    left.keep([1, 2, 3, 4, 5])
    alone = left.scores(torch.ones(UNITS))
    assert both[0] == pytest.approx(float(both[1]))
    assert alone[0] == 0.0
    assert alone[1] > 10 * both[1]


def test_wide_heads_are_scored_on_several_threads() -> None:
    """The LU of a batch of matrices of this size fails on two, in the oneMKL of torch 2.13."""
    x = features(192, 1200)
    gradients = torch.eye(192, dtype=torch.float64).expand(UNITS, -1, -1)
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            found.append(Unexplained.of(moment_of(x), 192, with_bias=False).scores(gradients))
        finally:
            torch.set_num_threads(before)
    torch.testing.assert_close(found[0], found[1])


def test_units_that_are_never_read_score_nothing() -> None:
    left = Unexplained.of(moment_of(torch.zeros(5, 4, dtype=torch.float64)), 1, with_bias=False)
    left.keep([1, 3])
    assert float(left.scores(torch.ones(4)).abs().max()) < 1e-300


def test_a_number_that_is_none_is_told() -> None:
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        Unexplained.of(moment_of(torch.full((5, 4), float("nan"))), 1, with_bias=False)


@pytest.mark.parametrize("name", NAMES)
def test_every_family_is_cut_by_it(name: str) -> None:
    model = tiny_model(name)
    batches = [tiny_batch(name, seed=seed) for seed in range(4)]
    before = apt.summary(apt.patch_model(tiny_model(name))).units
    with torch.no_grad():
        dense = model.eval()(**batches[0]).logits
    model = apt.compress(model, batches, 0.3, salience="obs", rounds=2, round_to=1)
    after = apt.summary(model).units
    assert sum(after.values()) < sum(before.values())
    with torch.no_grad():
        assert 0.0 < float((model(**batches[0]).logits - dense).abs().max()) < 1e3


def test_of_duplicates_one_stays() -> None:
    """Half the neurons are copies of the others: of every pair but one a layer, which nothing asks for, one stays."""
    model = tiny_model("llama_gqa")
    half = model.config.intermediate_size // 2
    for layer in model.model.layers:
        for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
            linear.weight.data[half:] = linear.weight.data[:half]
    total = sum(p.numel() for layer in model.model.layers for p in layer.parameters())
    gone = len(model.model.layers) * (half - 2) * 3 * model.config.hidden_size
    settings: dict[str, Any] = {"salience": "obs", "rounds": 1, "round_to": 1, "unit_types": ["neuron"]}
    batches = [tiny_batch("llama_gqa", seed=seed) for seed in range(32)]
    apt.compress(model, batches, gone / total, layout="uniform", **settings)
    for layer in model.model.layers:
        rows = layer.mlp.gate_proj.weight
        assert len(rows) == half + 2
        assert len(rows.unique(dim=0)) >= half - 1


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, "set repair='weights'"),
        ({"repair": "weights", "kurtosis": "paper"}, "kurtosis must be 'off'"),
        ({"repair": "weights", "unit_types": ["head", "hidden"]}, "hidden dimensions have no salience 'obs'"),
    ],
)
def test_what_it_does_not_go_with_is_told(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        APTConfig().with_overrides(salience="obs", **settings)


def test_a_loop_of_ones_own_runs_with_it() -> None:
    model = patched("bert", target_sparsity=0.5, salience="obs", repair="weights", num_events=1, moment_batches=4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    batches = [tiny_batch("bert", seed=seed) for seed in range(4)]
    run = apt.Controller(model, optimizer, 10, calibration=apt.Calibration(lambda step: batches))
    for step in range(10):
        batch = tiny_batch("bert", seed=step)
        run.loss(model(**batch), batch).backward()
        run.after_backward()
        optimizer.step()
        run.after_step()
        optimizer.zero_grad()
    assert apt.summary(model).sparsity >= 0.5
    assert math.isfinite(float(model(**batch).loss.detach()))
