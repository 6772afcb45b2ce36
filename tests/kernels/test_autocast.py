"""Autocast changes the arithmetic of the linear ops alone; what every other op gives is what it gives without."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from check import no_worse_than_eager
from lora_cases import EVERYTHING, cast, make_inputs, run, upstream_of
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

import apt_kernels
from apt_kernels import masked_lora_linear, masked_lora_linears, reference

HALVES = [torch.float16, torch.bfloat16]
BACKENDS = ["torch", "triton"]
Op = Callable[[Tensor, Any], dict[str, Tensor]]


def norm(kind: str) -> Op:
    def run_norm(x: Tensor, padding: Tensor | None, backend: str) -> dict[str, Tensor]:
        D = x.shape[-1]
        weight = torch.linspace(0.5, 1.5, D, device=x.device).requires_grad_()
        bias = torch.linspace(-1.0, 1.0, D, device=x.device).requires_grad_()
        mask = torch.arange(D, device=x.device).remainder(3) / 2.0
        y = apt_kernels.masked_norm(x, weight, bias, mask=mask, eps=1e-6, kind=kind, backend=backend)
        y.backward(torch.sin(x.detach()).to(y.dtype))
        return {"y": y.detach(), "x": x.grad, "weight": weight.grad, "bias": bias.grad}

    return run_norm


def collecting(op: Callable[..., Tensor]) -> Op:
    def run_collecting(x: Tensor, padding: Tensor | None, backend: str) -> dict[str, Tensor]:
        sums, count = torch.zeros(2, x.shape[-1], device=x.device), torch.zeros((), device=x.device)
        mask = torch.arange(x.shape[-1], device=x.device).remainder(3) / 2.0
        y = op(x, mask, sums=sums, count=count, valid=padding, backend=backend)
        y.backward(torch.sin(x.detach()).to(y.dtype))
        return {"y": y.detach(), "x": x.grad, "sums": sums, "count": count}

    return run_collecting


def activation(g: Tensor, mask: Tensor, **more: Any) -> Tensor:
    return apt_kernels.gated_activation(g, torch.cos(g.detach()), mask, kind="gelu", **more)


def sums_of(x: Tensor, padding: Tensor | None, backend: str) -> dict[str, Tensor]:
    return {"sums": apt_kernels.column_sums(x, padding, backend=backend)}


def kurtosis(x: Tensor, padding: Tensor | None, backend: str) -> dict[str, Tensor]:
    weight = x.detach().flatten(0, -2)
    a, b = weight[:3] / 3.0, weight[:, :3] / 3.0
    both = apt_kernels.weight_kurtosis(weight, a, b, scale=0.7, group=2, column_scale=weight[0], backend=backend)
    return dict(zip(("columns", "rows"), both, strict=True))


OPS: dict[str, Op] = {
    "layer norm": norm("layer"),
    "rms norm": norm("rms"),
    "gate": collecting(apt_kernels.gate),
    "activation": collecting(activation),
    "column sums": sums_of,
    "kurtosis": kurtosis,
}


def tokens(device: str, dtype: torch.dtype) -> Tensor:
    return (4.0 * torch.randn(3, 5, 18, device=device)).to(dtype)


@pytest.mark.pairs
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", list(OPS))
def test_all_but_the_linear_ops_are_what_they_are_without(
    name: str, backend: str, half: torch.dtype, dtype: torch.dtype, padded: bool, device: str
) -> None:
    x = tokens(device, dtype)
    padding = torch.randint(0, 2, (3, 5), device=device) if padded else None
    without = OPS[name](x.clone().requires_grad_(), padding, backend)
    with torch.autocast(device, dtype=half):
        got = OPS[name](x.clone().requires_grad_(), padding, backend)
    for part, value in without.items():
        assert got[part].dtype == value.dtype
        assert torch.equal(got[part], value), f"{part}: {(got[part] - value).abs().max():.1e} apart"


def test_a_row_with_one_large_value_is_normalised(device: str) -> None:
    """In fp16 its square is infinite, and the whole row became 0."""
    x = torch.zeros(2, 209, device=device)
    x[:, 0], weight = 400.0, torch.ones(209, device=device)
    with torch.autocast(device, dtype=torch.float16):
        y = apt_kernels.masked_norm(x, weight, eps=1e-6, kind="rms")
    torch.testing.assert_close(y[:, 0], torch.full((2,), 209.0**0.5, device=device))


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_sums_beyond_the_range_of_half_precision_are_finite_and_wide(half: torch.dtype, device: str) -> None:
    x, valid = torch.ones(70_000, 2, device=device), torch.ones(70_000, device=device, dtype=half)
    valid[::2] = 0
    sums, count = torch.zeros(2, 2, device=device), torch.zeros((), device=device)
    with torch.autocast(device, dtype=half):
        assert torch.equal(apt_kernels.column_sums(2.0 * x, valid), torch.full((2,), 70_000.0, device=device))
        apt_kernels.gate(x.requires_grad_(), sums=sums, count=count, valid=valid).sum().backward()
    assert torch.equal(sums, torch.full((2, 2), 35_000.0, device=device))
    assert count == 35_000  # counted in bfloat16 it would end at 256 more or less


@contextmanager
def nothing() -> Iterator[None]:
    yield


@pytest.mark.pairs
@pytest.mark.parametrize("backward_too", [True, False], ids=["both", "forward"])
@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize("backend", ["torch", "split_cublas", "split_triton", "one_kernel"])
def test_the_linear_op_casts_x_and_weight(backend: str, half: torch.dtype, backward_too: bool, device: str) -> None:
    inputs = cast(make_inputs((3, 7), 20, 28, 5, device, **EVERYTHING), torch.float32)
    upstream = upstream_of(inputs)
    with torch.autocast(device, dtype=half) if backward_too else nothing():
        got = run(_forward_under(half, backend, device), inputs, upstream)
    assert got.pop("y").dtype == half
    assert {t.dtype for t in got.values()} == {torch.float32}
    eager = run(reference.masked_lora_linear, cast(inputs, half), upstream)
    truth = run(reference.masked_lora_linear, cast(inputs, torch.float64), upstream)
    for name, grad in got.items():
        no_worse_than_eager(name, grad.to(half), eager[name], truth[name])


def _forward_under(half: torch.dtype, backend: str, device: str) -> Callable[..., Tensor]:
    def forward(*args: Any, **kwargs: Any) -> Tensor:
        with torch.autocast(device, dtype=half):
            return masked_lora_linear(*args, backend=backend, **kwargs)

    return forward


@pytest.mark.pairs
@pytest.mark.parametrize("backward_too", [True, False], ids=["both", "forward"])
@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize("backend", ["torch", "split_cublas"])
def test_linears_that_share_their_input_equal_each_alone(
    backend: str, half: torch.dtype, backward_too: bool, device: str
) -> None:
    x = torch.randn(6, 20, device=device)
    layers = [[torch.randn(*shape, device=device) / 5.0 for shape in ((O, 20), (3, 20), (O, 3))] for O in (16, 24)]

    def grads_of(together: bool) -> list[Tensor]:
        leaves = [x.clone().requires_grad_(), *(t.clone().requires_grad_() for layer in layers for t in layer[1:])]
        weights, a, b = [layer[0] for layer in layers], leaves[1::2], leaves[2::2]
        with torch.autocast(device, dtype=half):
            if together:
                ys = masked_lora_linears(leaves[0], weights, a, b, scale=0.7, backend=backend)
            else:
                each = zip(weights, a, b, strict=True)
                ys = [masked_lora_linear(leaves[0], *own, scale=0.7, backend=backend) for own in each]
        assert {y.dtype for y in ys} == {half}
        with torch.autocast(device, dtype=half) if backward_too else nothing():
            found = torch.autograd.grad(ys, leaves, [torch.ones_like(y) for y in ys])
        return [y.detach() for y in ys] + list(found)

    for got, wanted in zip(grads_of(True), grads_of(False), strict=True):
        assert got.dtype == wanted.dtype
        torch.testing.assert_close(got, wanted, rtol=4 * torch.finfo(half).eps, atol=16 * torch.finfo(half).eps)


@pytest.mark.parametrize("op", ["alone", "together"])
def test_autocast_leaves_float64_alone(op: str, device: str) -> None:
    x, weight, a, b = (torch.randn(*s, dtype=torch.float64, device=device) for s in ((3, 6), (4, 6), (2, 6), (4, 2)))

    def call() -> Tensor:
        if op == "alone":
            return masked_lora_linear(x, weight, a, b, scale=1.0)
        return masked_lora_linears(x, [weight], [a], [b], scale=1.0)[0]

    with torch.autocast(device, dtype=torch.bfloat16):
        y = call()
    assert y.dtype == torch.float64
    assert torch.equal(y, call())


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_a_norm_keeps_x_as_it_came_and_two_numbers_a_row(half: torch.dtype, device: str) -> None:
    x = tokens(device, half).requires_grad_()
    weight = torch.ones(18, device=device, requires_grad=True)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        apt_kernels.masked_norm(x, weight, eps=1e-6, kind="rms", backend="torch")
    known = {t.untyped_storage().data_ptr() for t in (x, weight)}
    assert sum(size for place, size in kept.items() if place not in known) <= 2 * 4 * 15


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_compiled_whole(half: torch.dtype, device: str) -> None:
    weight, a, b = (torch.randn(*shape, device=device) / 4.0 for shape in ((18, 18), (3, 18), (18, 3)))
    padding = torch.randint(0, 2, (3, 5), device=device)

    def step(x: Tensor, sums: Tensor, count: Tensor) -> Tensor:
        with torch.autocast(device, dtype=half):
            y = masked_lora_linear(x, weight, a, b, scale=0.7)
            y = apt_kernels.masked_norm(y, weight[0], eps=1e-6, kind="rms")
            return apt_kernels.gate(y, sums=sums, count=count, valid=padding)

    found = []
    for run_step in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        x = torch.randn(3, 5, 18, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
        sums, count = torch.zeros(2, 18, device=device), torch.zeros((), device=device)
        run_step(x, sums, count).float().sum().backward()
        found.append((sums, count, x.grad))
    for ours, wanted in zip(*found, strict=True):
        torch.testing.assert_close(ours, wanted)
