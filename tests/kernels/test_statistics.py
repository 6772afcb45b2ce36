"""The gate and the column sums by either backend: the oracle, strides, padding, repeatability, the registered ops."""

import math
from typing import Any

import pytest
import torch
from check import close, no_worse_than_eager
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import apt_kernels
from apt_kernels import column_sums, gate, reference

BACKENDS = ["torch", "triton"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 3), (5, 7), (2, 9, 130), (3, 32), (3, 0), (0, 4)]  # one token, 3-D, past one tile, empty
CASES = [(dtype, shape) for dtype in DTYPES for shape in SHAPES] + [(torch.float32, (270, 136))]  # two blocks a slice


def halves(D: int, device: str) -> Tensor:
    return torch.randint(0, 3, (D,), device=device) / 2


def new_statistics(D: int, device: str) -> dict[str, Tensor]:
    return {"sums": torch.zeros(2, D, device=device), "count": torch.zeros((), device=device)}


def ran(op: str) -> set[str]:
    return set(apt_kernels.calls()[op])


@pytest.mark.pairs
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "full"])
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "open"])
@pytest.mark.parametrize(("dtype", "shape"), CASES, ids=str)
def test_gate_meets_the_oracle(
    backend: str, dtype: torch.dtype, padded: bool, masked: bool, shape: tuple[int, ...], device: str
) -> None:
    h, upstream = (torch.randn(*shape, device=device).to(dtype) for _ in range(2))
    mask = halves(shape[-1], device) if masked else None
    valid = torch.randint(2, shape[:-1], device=device) if padded else None
    statistics, leaf = new_statistics(shape[-1], device), h.clone().requires_grad_()
    apt_kernels.reset_calls()
    y = gate(leaf, mask, valid=valid, backend=backend, **statistics)
    assert not statistics["sums"].any()
    (dh,) = torch.autograd.grad(y, leaf, upstream)
    assert ran("gate") == {backend}
    assert torch.equal(leaf, h)
    m = torch.ones(shape[-1], device=device) if mask is None else mask
    for name, ours, given in (("y", y.detach(), h), ("h", dh, upstream)):
        no_worse_than_eager(name, ours, given * m.to(dtype), given.double() * m)
    for ours, given in zip(statistics["sums"], (h, upstream), strict=True):
        eager, truth = (reference.column_sums(given.to(to), valid) for to in (torch.float32, torch.float64))
        no_worse_than_eager("sums", ours, eager, truth)
    assert statistics["count"] == (math.prod(shape[:-1]) if valid is None else valid.sum())


@pytest.mark.pairs
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "shape"), [*CASES, (torch.float32, (2100, 5))], ids=str)
def test_column_sums_meet_the_oracle(backend: str, dtype: torch.dtype, shape: tuple[int, ...], device: str) -> None:
    x = torch.randn(*shape, device=device).to(dtype)
    apt_kernels.reset_calls()
    for valid in (
        None,
        torch.randint(2, shape[:-1], device=device),
        torch.randint(2, shape[:-1], device=device).bool(),
    ):
        eager, truth = (reference.column_sums(x.to(to), valid) for to in (torch.float32, torch.float64))
        no_worse_than_eager("sums", column_sums(x, valid, backend=backend), eager, truth)
    assert ran("column_sums") == {backend}


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_do_not_matter(backend: str, device: str) -> None:
    wide, tall, row = (torch.randn(*shape, device=device) for shape in ((9, 40), (16, 9), (1, 16)))
    for x in (wide[:, :16], wide[:, 3:19], wide[::2, 8:24], tall.T, row.expand(9, 16)):
        close("sums", column_sums(x, backend=backend), x.abs().sum(0))
        mask = torch.rand(32, device=device)[::2]
        leaf = x.detach().requires_grad_()
        y = gate(leaf, mask, backend=backend)
        close("y", y.detach(), x * mask)
        y.backward(row.expand(x.shape))
        close("h", leaf.grad, (row * mask).expand(x.shape))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_all_zero_mask_still_collects(backend: str, device: str) -> None:
    h, upstream = torch.randn(6, 8, device=device, requires_grad=True), torch.randn(6, 8, device=device)
    statistics = new_statistics(8, device)
    y = gate(h, torch.zeros(8, device=device), backend=backend, **statistics)
    assert not y.any()
    assert not torch.autograd.grad(y, h, upstream)[0].any()
    close("sums", statistics["sums"], torch.stack([t.detach().abs().sum(0) for t in (h, upstream)]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_and_a_checkpoint_give_the_same_bits(backend: str, device: str) -> None:
    h, upstream = torch.randn(270, 136, device=device, requires_grad=True), torch.randn(270, 136, device=device)
    mask = halves(136, device)

    def bits(recompute: bool) -> list[Tensor]:
        statistics = new_statistics(136, device)

        def step(x: Tensor) -> Tensor:
            return gate(x, mask, backend=backend, **statistics)

        y = checkpoint(step, h, use_reentrant=False) if recompute else step(h)
        return [y.detach(), *torch.autograd.grad(y, h, upstream), *statistics.values()]

    first = bits(False)
    assert all(torch.equal(*pair) for again in (bits(False), bits(True)) for pair in zip(first, again, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_open_gate_passes_bits_through(backend: str, device: str) -> None:
    h = torch.tensor([[-0.0, 1e-40, float("inf"), float("nan")]], device=device, requires_grad=True)
    for statistics in ({}, new_statistics(4, device)):
        y = gate(h, backend=backend, **statistics)
        assert torch.equal(y.view(torch.int32), h.view(torch.int32))


@pytest.mark.interpreted
def test_registered_ops_keep_the_rules(device: str) -> None:
    x, mask, valid = torch.randn(5, 24, device=device), halves(24, device), torch.ones(5, device=device)
    ops = torch.ops.apt_kernels
    for given in ((x, mask, valid, True), (x, mask, None, False), (x, None, valid, True)):
        torch.library.opcheck(ops.gate_pass, (*given, "triton"))
    torch.library.opcheck(ops.column_sums, (x, valid, "triton"))
    y, _ = ops.gate_pass(x, torch.ones_like(mask), None, False, "triton")
    assert y.data_ptr() != x.data_ptr()


@pytest.mark.interpreted
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("collecting", [True, False], ids=["collecting", "bare"])
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "open"])
def test_one_graph_under_compile(backend: str, collecting: bool, masked: bool, device: str) -> None:
    h, upstream = torch.randn(5, 24, device=device, requires_grad=True), torch.randn(5, 24, device=device)
    mask = halves(24, device) if masked else None

    def step(h: Tensor, sums: Tensor, count: Tensor) -> Tensor:
        return gate(h * 2, mask, backend=backend, **({"sums": sums, "count": count} if collecting else {})) + 1

    def result(op: Any) -> list[Tensor]:
        statistics = new_statistics(24, device)
        y = op(h, *statistics.values())
        return [y.detach(), *torch.autograd.grad(y, h, upstream), *statistics.values()]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for name, got, wanted in zip(("y", "h", "sums", "count"), result(compiled), result(step), strict=True):
        close(name, got, wanted)
