"""The gate's product and its statistics, against brute force; column sums against the reference."""

import pytest
import torch
from check import close
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from apt_kernels import column_sums, gate, reference

SHAPES = [(1, 3), (5, 7), (2, 9, 130), (4, 0), (0, 4)]


def statistics(D: int, device: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.zeros(2, D, dtype=dtype, device=device), torch.zeros((), dtype=dtype, device=device)


def padding(device: str) -> Tensor:
    return torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 1, 1, 0]], device=device)


@pytest.mark.parametrize("masked", [True, False], ids=["masked", "open"])
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "full"])
def test_gate_equals_brute_force(masked: bool, padded: bool, device: str) -> None:
    mask = torch.randint(0, 3, (7,), device=device).double() / 2 if masked else None
    valid = padding(device) if padded else None
    m = torch.ones(7, dtype=torch.float64, device=device) if mask is None else mask
    weight = torch.ones(3, 5, 1, device=device) if valid is None else valid[..., None]
    sums, count = statistics(7, device)
    want_sums, want_count = torch.zeros_like(sums), torch.zeros_like(count)
    for _ in range(2):  # micro-batches add up
        h = torch.randn(3, 5, 7, dtype=torch.float64, device=device, requires_grad=True)
        upstream = torch.randn(3, 5, 7, dtype=torch.float64, device=device)
        y = gate(h, mask, sums=sums, count=count, valid=valid)
        (dh,) = torch.autograd.grad(y, h, upstream)
        assert torch.equal(y, h * m)
        assert torch.equal(dh, upstream * m)
        want_sums += torch.stack([(t.detach().abs() * weight).sum((0, 1)) for t in (h, upstream)])
        want_count += weight.sum()
        close("sums", sums, want_sums)
        assert count == want_count


def test_an_open_gate_passes_bits_through(device: str) -> None:
    h = torch.tensor([[-0.0, 1e-40, float("inf"), float("nan")]], device=device, requires_grad=True)
    for statistic in ({}, dict(zip(("sums", "count"), statistics(4, device, torch.float32), strict=True))):
        y = gate(h, **statistic)
        assert torch.equal(y.view(torch.int32), h.view(torch.int32))


def test_nothing_is_collected_without_a_backward(device: str) -> None:
    sums, count = statistics(4, device)
    h = torch.randn(6, 4, dtype=torch.float64, device=device, requires_grad=True)
    gate(h, sums=sums, count=count)  # forward only, thrown away
    with torch.no_grad():
        gate(h, sums=sums, count=count)
    gate(h.detach(), sums=sums, count=count)  # nothing upstream learns
    assert count == 0
    assert not sums.any()


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpointing_counts_once(use_reentrant: bool, device: str) -> None:
    sums, count = statistics(4, device)
    h = torch.randn(6, 4, dtype=torch.float64, device=device, requires_grad=True)
    upstream = torch.randn(6, 4, dtype=torch.float64, device=device)
    y = checkpoint(lambda x: gate(x * 2, sums=sums, count=count), h, use_reentrant=use_reentrant)
    y.backward(upstream)
    assert count == 6
    close("sums", sums, torch.stack([2 * h.detach().abs().sum(0), upstream.abs().sum(0)]))


def test_sums_of_half_precision_are_taken_in_float32(device: str) -> None:
    h = torch.full((4096, 2), 0.1, dtype=torch.bfloat16, device=device, requires_grad=True)
    sums, count = statistics(2, device, torch.float32)
    gate(h, sums=sums, count=count).backward(torch.ones_like(h))
    close("sums", sums, torch.tensor([[4096 * h[0, 0].item()] * 2, [4096.0] * 2], device=device))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_column_sums_equal_the_reference(shape: tuple[int, ...], device: str) -> None:
    x = torch.randn(*shape, dtype=torch.float64, device=device)
    valid = torch.randint(2, shape[:-1], device=device)
    close("all", column_sums(x), reference.column_sums(x))
    close("valid", column_sums(x, valid), reference.column_sums(x, valid))
    close("valid, bool", column_sums(x, valid.bool()), reference.column_sums(x, valid))
    assert column_sums(x.bfloat16()).dtype == torch.float32


def test_bad_input_names_the_dimensions() -> None:
    h, (sums, count) = torch.zeros(2, 5, 4), statistics(4, "cpu")
    with pytest.raises(ValueError, match=r"gate: mask must be \[4\], got \[3\]"):
        gate(h, torch.ones(3))
    with pytest.raises(ValueError, match=r"gate: valid must be \[2, 5\], got \[2, 4\]"):
        gate(h, sums=sums, count=count, valid=torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"gate: sums must be \[2, 4\], got \[4\]"):
        gate(h, sums=torch.zeros(4), count=count)
    with pytest.raises(ValueError, match="sums and count go together"):
        gate(h, sums=sums)
    with pytest.raises(ValueError, match=r"column_sums: valid must be \[2, 5\], got \[5\]"):
        column_sums(h, torch.ones(5))
