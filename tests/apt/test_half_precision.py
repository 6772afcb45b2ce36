"""A run under autocast prunes by the sums of a run without, up to the rounding of its activations."""

from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY, tiny_model
from torch import Tensor, nn

import apt
from apt.families import anatomy_of
from apt.layers import adapted
from apt.layers.passes import Pass, Passes, ValidTokens
from apt.layers.unit_mask import UnitMask
from apt.methods.adalora import orthogonality
from apt.methods.config import MethodConfig
from apt.pruning.salience import OutlierTerm, unit_scores
from apt.pruning.units import find_units

HALVES = [torch.float16, torch.bfloat16]


def scores(model: nn.Module, half: torch.dtype | None) -> Tensor:
    """Salience with kurtosis of every head and neuron, of one padded batch."""
    groups = find_units(anatomy_of(model))
    for group in groups:
        group.mask.collecting, group.mask.totals = True, group.kind == "head"
        group.mask.reset_sums()
    ids = torch.randint(5, VOCABULARY, (4, 11), generator=torch.Generator().manual_seed(1))
    padding = torch.ones_like(ids)
    padding[1:, 7:] = 0
    with torch.autocast("cpu", dtype=half or torch.bfloat16, enabled=half is not None):
        out: Any = model(input_ids=ids, attention_mask=padding)
        out.logits.float().square().mean().backward()
        found = OutlierTerm("normalized").add(groups, {group.name: unit_scores(group) for group in groups})
    return torch.cat(list(found.values()))


@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_scores_of_a_plan(family: str, half: torch.dtype) -> None:
    model = apt.patch_model(tiny_model(family, torch.float32)).eval()
    exact, got = scores(model, None), scores(model, half)
    assert torch.isfinite(got).all()
    apart = ((got - exact).abs() / exact.abs()).median()
    assert apart < 2.0 * torch.finfo(half).eps, f"{apart:.1e} apart in the median"


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_totals_weights_and_penalties_are_what_they_are_without(half: torch.dtype) -> None:
    torch.manual_seed(0)
    passes = Passes()
    mask = UnitMask(3, 4, ValidTokens(passes))
    mask.collecting = mask.totals = True
    current = Pass()
    current.valid["layers"] = torch.randint(0, 2, (5, 7))
    h = torch.randn(5, 7, 12)
    model = apt.patch_model(tiny_model("bert", torch.float32), method="adalora")
    linear = next(layer for _, layer in adapted(model) if layer.rank)

    def found() -> list[Tensor]:
        mask.reset_sums()
        passes.run(current, mask, h.clone().requires_grad_()).sum().backward()
        penalty = orthogonality([linear.delta], MethodConfig())
        return [mask.total.clone(), linear.merged_weight(), penalty.detach()]

    without = found()
    with torch.autocast("cpu", dtype=half):
        got = found()
    for ours, wanted in zip(got, without, strict=True):
        assert torch.equal(ours, wanted)
