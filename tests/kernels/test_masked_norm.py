"""Mask-weighted norms: the dense norm at 1, the shrunk norm at 0 and 1, continuous between."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from check import close, no_worse_than_eager
from torch import Tensor

from apt_kernels import masked_norm, reference

KINDS = ["layer", "rms"]
EPS = 1e-6


def operands(D: int, device: str, lead: tuple[int, ...] = (3, 5)) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(*lead, D, dtype=torch.float64, device=device) * 2 + 1
    return x, torch.rand(D, dtype=torch.float64, device=device) + 0.5, torch.randn(D, dtype=torch.float64).to(device)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "ones"])
def test_dense(kind: str, masked: bool, device: str) -> None:
    x, weight, bias = operands(12, device)
    mask = torch.ones_like(weight) if masked else None
    dense = F.layer_norm(x, (12,), weight, bias, EPS) if kind == "layer" else F.rms_norm(x, (12,), weight, EPS) + bias
    close("with bias", masked_norm(x, weight, bias, mask=mask, eps=EPS, kind=kind), dense)
    close("without", masked_norm(x, weight, mask=mask, eps=EPS, kind=kind), dense - bias)


@pytest.mark.parametrize("kind", KINDS)
def test_kept_dimensions_see_the_shrunk_norm(kind: str, device: str) -> None:
    x, weight, bias = operands(12, device)
    mask = (torch.arange(12, device=device) % 3 > 0).double()
    kept = mask.bool()
    ours = masked_norm(x, weight, bias, mask=mask, eps=EPS, kind=kind)[..., kept]
    close(kind, ours, masked_norm(x[..., kept], weight[kept], bias[kept], eps=EPS, kind=kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "dense"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_output_and_gradients(kind: str, with_bias: bool, masked: bool, dtype: torch.dtype, device: str) -> None:
    given = [t.to(dtype) for t in operands(33, device, (7,))][: 2 + with_bias]
    mask = (torch.randint(0, 3, (33,), device=device) / 2).to(dtype) if masked else None
    upstream = torch.randn(7, 33, device=device).to(dtype)

    def run(op: Any, to: torch.dtype) -> list[Tensor]:
        leaves = [t.detach().to(to).requires_grad_() for t in given]
        x, weight, bias = (*leaves, None)[:3]
        y = op(x, weight, bias, mask=None if mask is None else mask.to(to), eps=EPS, kind=kind)
        return [y.detach(), *torch.autograd.grad(y, leaves, upstream.to(to))]

    ours, eager, truth = (
        run(masked_norm, dtype),
        run(reference.masked_norm, dtype),
        run(reference.masked_norm, torch.float64),
    )
    for name, *triple in zip(("y", "x", "weight", "bias"), ours, eager, truth, strict=False):
        no_worse_than_eager(f"{kind} {name}", *triple)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str, device: str) -> None:
    x, weight, bias = (t.requires_grad_() for t in operands(6, device, (2, 2)))
    mask = torch.tensor([1.0, 0.0, 0.5, 1.0, 0.01, 1.0], dtype=torch.float64, device=device)
    assert torch.autograd.gradcheck(lambda *t: masked_norm(*t, mask=mask, eps=1e-3, kind=kind), (x, weight, bias))


@pytest.mark.parametrize("kind", KINDS)
def test_continuous_where_masks_reach_zero(kind: str, device: str) -> None:
    """Dropping a dimension from the statistics at exactly 0 would move the others by sqrt(8 / 12)."""
    x, weight, bias = operands(12, device)

    def at(value: float) -> Tensor:
        mask = torch.ones_like(weight)
        mask[4:8] = value
        return masked_norm(x, weight, bias, mask=mask, eps=EPS, kind=kind)

    step = (at(0.01) - at(0.0)).abs().max().item()
    assert 0 < step < 0.1
    assert (at(0.001) - at(0.0)).abs().max().item() < step / 5
    assert (at(1e-6) - at(0.0)).abs().max().item() < step / 5000


def test_bad_input_names_the_dimensions() -> None:
    x, weight, bias = operands(4, "cpu")
    for wrong in ("weight", "bias", "mask"):
        named = {"weight": weight, "bias": bias, "mask": weight, wrong: torch.ones(5)}
        with pytest.raises(ValueError, match=rf"masked_norm: {wrong} must be \[4\], got \[5\]"):
            masked_norm(x, eps=EPS, **named)
    with pytest.raises(ValueError, match="kind must be 'layer' or 'rms', got 'batch'"):
        masked_norm(x, weight, bias, eps=EPS, kind="batch")
