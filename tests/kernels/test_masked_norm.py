"""Mask-weighted norms: the dense norm at 1, the shrunk norm at 0 and 1, continuous between."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from check import close, no_worse_than_eager
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import apt_kernels
from apt_kernels import masked_norm, reference

KINDS = ["layer", "rms"]
BACKENDS = ["torch", "triton"]
SHAPES = [(1, 3), (7, 33), (2, 3, 130), (0, 5), (3, 0)]  # one token, ragged, 3-D, an empty axis
LARGE = [(270, 72), (1, 16384), (2, 8201)]  # two blocks a slice, the widest row, and one that is read block by block
BETWEEN = [(3, 2000), (1, 4096), (2, 8001)]  # the other blocks that hold a row
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


def run(
    op: Any, given: list[Tensor], upstream: Tensor, mask: Tensor | None, to: torch.dtype, **how: Any
) -> list[Tensor]:
    """Output and the gradients of all that is given: x, weight and, where it is there, bias."""
    leaves = [t.detach().to(to).requires_grad_() for t in given]
    y = op(*leaves, *[None] * (3 - len(leaves)), mask=None if mask is None else mask.to(to), eps=EPS, **how)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream.to(to))]


@pytest.mark.pairs
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "dense"])
@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        *((dtype, shape) for dtype in (torch.float32, torch.float16, torch.bfloat16) for shape in SHAPES),
        *((torch.float32, shape) for shape in LARGE),
        *(pytest.param(torch.float32, shape, marks=pytest.mark.interpreted) for shape in BETWEEN),
    ],
    ids=str,
)
def test_the_kernel_meets_the_oracle(
    kind: str, masked: bool, dtype: torch.dtype, shape: tuple[int, ...], device: str
) -> None:
    D = shape[-1]
    given = [t.to(dtype) for t in operands(D, device, shape[:-1])]
    given = given if masked else given[:2]  # without a bias too
    mask = (torch.randint(0, 3, (D,), device=device) / 2).to(dtype) if masked else None
    if masked and D:
        mask[0] = 1
    upstream = torch.randn(*shape, device=device).to(dtype)
    apt_kernels.reset_calls()
    ours = run(masked_norm, given, upstream, mask, dtype, kind=kind, backend="triton")
    assert set(apt_kernels.calls()["masked_norm"]) == {"triton"}
    eager, truth = (run(reference.masked_norm, given, upstream, mask, to, kind=kind) for to in (dtype, torch.float64))
    for name, *triple in zip(("y", "x", "weight", "bias"), ours, eager, truth, strict=False):
        no_worse_than_eager(f"{kind} {name}", *triple)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1)], ids=str)
def test_each_subset_of_gradients_gives_the_same_bits(
    backend: str, kind: str, needs: tuple[int, int, int], device: str
) -> None:
    given, upstream = [t.float() for t in operands(40, device, (9,))], torch.randn(9, 40, device=device)
    mask = torch.rand(40, device=device)
    whole = run(masked_norm, given, upstream, mask, torch.float32, kind=kind, backend=backend)
    leaves = [t.clone().requires_grad_(bool(need)) for t, need in zip(given, needs, strict=True)]
    masked_norm(*leaves, mask=mask, eps=EPS, kind=kind, backend=backend).backward(upstream)
    for leaf, need, wanted in zip(leaves, needs, whole[1:], strict=True):
        assert torch.equal(leaf.grad, wanted) if need else leaf.grad is None


@pytest.mark.parametrize("D", [12, 8201])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_an_all_zero_mask_gives_finite_values(backend: str, kind: str, D: int, device: str) -> None:
    """As when all heads under a norm across heads are gone: what is multiplied by 0 afterwards must not be NaN."""
    given, upstream = [t.float() for t in operands(D, device, (3,))], torch.randn(3, D, device=device)
    ours, truth = (
        run(op, given, upstream, torch.zeros(D, device=device), torch.float32, kind=kind, **how)
        for op, how in ((masked_norm, {"backend": backend}), (reference.masked_norm, {}))
    )
    assert all(torch.isfinite(t).all() for t in ours)
    for name, got, wanted in zip(("y", "x", "weight", "bias"), ours, truth, strict=True):
        close(name, got, wanted)


@pytest.mark.interpreted
@pytest.mark.parametrize("kind", KINDS)
def test_the_kernel_sees_the_shrunk_norm(kind: str, device: str) -> None:
    given, upstream = [t.float() for t in operands(130, device, (5,))], torch.randn(5, 130, device=device)
    mask = (torch.arange(130, device=device) % 3 > 0).float()
    kept = mask.bool()
    upstream = upstream * mask
    masked = run(masked_norm, given, upstream, mask, torch.float32, kind=kind, backend="triton")
    few = [t[..., kept] for t in given]
    shrunk = run(masked_norm, few, upstream[:, kept], None, torch.float32, kind=kind, backend="triton")
    for name, whole, part in zip(("y", "x", "weight", "bias"), masked, shrunk, strict=True):
        close(name, whole[..., kept], part)


def test_strides_and_dtypes_of_the_vectors_do_not_matter(device: str) -> None:
    x, weight, bias = (t.float() for t in operands(24, device, (6,)))
    row, mask = torch.randn(1, 24, device=device), torch.rand(48, device=device)
    wide = [torch.cat([x, x], 1)[:, :24], weight.repeat_interleave(2)[::2], bias.repeat_interleave(2)[::2]]
    turned = [x.T.contiguous().T, weight, bias]
    want = run(reference.masked_norm, [x, weight, bias], row.expand(6, 24), mask[::2], torch.float32, kind="layer")
    for given in (wide, turned):
        leaves = [t.detach().requires_grad_() for t in given]  # no copy, the strides stay
        y = masked_norm(*leaves, mask=mask[::2], eps=EPS, kind="layer", backend="triton")
        for name, got, wanted in zip(
            "yxwb", [y, *torch.autograd.grad(y, leaves, row.expand(6, 24))], want, strict=True
        ):
            close(name, got.detach(), wanted)
    leaves = [t.requires_grad_() for t in (x.bfloat16(), weight, bias)]
    y = masked_norm(*leaves, eps=EPS, backend="triton")
    y.backward(torch.ones_like(y))
    assert [y.dtype, *[t.grad.dtype for t in leaves]] == [torch.bfloat16] * 2 + [torch.float32] * 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_and_a_checkpoint_give_the_same_bits(backend: str, device: str) -> None:
    leaves = [t.float().requires_grad_() for t in operands(72, device, (270,))]
    mask, upstream = torch.rand(72, device=device), torch.randn(270, 72, device=device)

    def step(*given: Tensor) -> Tensor:
        return masked_norm(*given, mask=mask, eps=EPS, backend=backend)

    def bits(recompute: bool) -> list[Tensor]:
        y = checkpoint(step, *leaves, use_reentrant=False) if recompute else step(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, upstream)]

    first = bits(False)
    assert all(torch.equal(*pair) for again in (bits(False), bits(True)) for pair in zip(first, again, strict=True))


def test_what_backward_keeps_is_x_and_two_floats_a_row(device: str) -> None:
    x, weight, bias = (t.float().requires_grad_() for t in operands(64, device, (9,)))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        masked_norm(x, weight, bias, mask=torch.ones(64, device=device), eps=EPS, backend="triton")
    assert [t.data_ptr() for t in kept if t.dim() == 2] == [x.data_ptr()]
    assert sum(t.numel() for t in kept if t.shape == (9,)) == 2 * 9


@pytest.mark.interpreted
@pytest.mark.parametrize("kind", KINDS)
def test_registered_ops_keep_the_rules(kind: str, device: str) -> None:
    x, weight, bias = (t.float().requires_grad_() for t in operands(24, device, (5,)))
    mask, ops, centred = torch.rand(24, device=device), torch.ops.apt_kernels, kind == "layer"
    torch.library.opcheck(ops.masked_norm_forward, (x, weight, bias, mask, EPS, centred, "triton"))
    torch.library.opcheck(ops.masked_norm_forward, (x, weight, None, None, EPS, centred, "triton"))
    rows = torch.rand(5, device=device), torch.rand(5, device=device)
    given = (torch.randn(5, 24, device=device), x.detach(), weight.detach(), mask, *rows, centred)
    torch.library.opcheck(ops.masked_norm_backward, (*given, True, True, True, "triton"))
    torch.library.opcheck(ops.masked_norm_backward, (*given, False, False, True, "triton"))


@pytest.mark.interpreted
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_one_graph_under_compile(backend: str, kind: str, device: str) -> None:
    given, upstream = [t.float() for t in operands(24, device, (5,))], torch.randn(5, 24, device=device)
    mask = torch.rand(24, device=device)

    def step(x: Tensor, weight: Tensor, bias: Tensor, **how: Any) -> Tensor:
        return masked_norm(x * 2, weight, bias, kind=kind, backend=backend, **how) + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    pair = [run(op, given, upstream, mask, torch.float32) for op in (compiled, step)]
    for name, got, wanted in zip(("y", "x", "weight", "bias"), *pair, strict=True):
        close(name, got, wanted)


def test_bad_input_names_the_dimensions(device: str) -> None:
    x, weight, bias = operands(4, device)
    for wrong in ("weight", "bias", "mask"):
        named = {"weight": weight, "bias": bias, "mask": weight, wrong: torch.ones(5, device=device)}
        with pytest.raises(ValueError, match=rf"masked_norm: {wrong} must be \[4\], got \[5\]"):
            masked_norm(x, eps=EPS, **named)
    with pytest.raises(ValueError, match="kind must be 'layer' or 'rms', got 'batch'"):
        masked_norm(x, weight, bias, eps=EPS, kind="batch")
    with pytest.raises(ValueError, match="masked_norm: the kernel holds rows of up to 16384 features, got 16385"):
        masked_norm(torch.zeros(1, 16385, device=device), torch.ones(16385, device=device), eps=EPS, backend="triton")
