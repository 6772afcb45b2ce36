"""act(g) * u * mask and its statistics: no further from the truth than eager, and the gate of the product."""

from typing import Any

import pytest
import torch
from check import close, no_worse_than_eager
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import apt_kernels
from apt_kernels import gate, gated_activation, reference

KINDS = ["silu", "gelu", "gelu_tanh"]
BACKENDS = ["torch", "triton"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 3), (5, 7), (2, 9, 130), (3, 0), (0, 4)]  # one token, ragged, 3-D, empty
CASES = [(dtype, shape) for dtype in DTYPES for shape in SHAPES] + [(torch.float32, (270, 136))]  # two blocks a slice


def operands(shape: tuple[int, ...], dtype: torch.dtype, device: str, gated: bool = True) -> list[Tensor]:
    return [(1.5 * torch.randn(*shape, device=device)).to(dtype) for _ in range(1 + gated)]


def halves(D: int, device: str) -> Tensor:
    return torch.randint(0, 3, (D,), device=device) / 2


def run(
    op: Any, given: list[Tensor], upstream: Tensor, mask: Tensor | None, dtype: torch.dtype, **options: Any
) -> list[Tensor]:
    """Output and the gradients of g and u."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in given]
    y = op(*leaves, *[None] * (2 - len(leaves)), None if mask is None else mask.to(dtype), **options)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream.to(dtype))]


@pytest.mark.pairs
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "alone"])
@pytest.mark.parametrize(("dtype", "shape"), CASES, ids=str)
def test_output_and_gradients(
    backend: str, kind: str, gated: bool, dtype: torch.dtype, shape: tuple[int, ...], device: str
) -> None:
    given, mask = operands(shape, dtype, device, gated), halves(shape[-1], device)
    (upstream,) = operands(shape, dtype, device, gated=False)
    apt_kernels.reset_calls()
    ours = run(gated_activation, given, upstream, mask, dtype, kind=kind, backend=backend)
    assert set(apt_kernels.calls()["gated_activation"]) == {backend}
    eager = run(reference.gated_activation, given, upstream, mask, dtype, kind=kind)
    truth = run(reference.gated_activation, given, upstream, mask, torch.float64, kind=kind)
    for name, *triple in zip(("y", "g", "u"), ours, eager, truth, strict=False):
        no_worse_than_eager(f"{kind} {name}", *triple)


@pytest.mark.pairs
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "full"])
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "open"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "alone"])
def test_statistics_are_those_of_the_gate_of_the_product(
    backend: str, kind: str, padded: bool, masked: bool, gated: bool, device: str
) -> None:
    g, u = (t.requires_grad_() for t in operands((3, 7, 37), torch.float32, device))
    mask = halves(37, device) if masked else None
    valid = torch.randint(2, (3, 7), device=device) if padded else None
    upstream = torch.randn(3, 7, 37, device=device)

    def collected(fused: bool) -> list[Tensor]:
        sums, count = torch.zeros(2, 37, device=device), torch.zeros((), device=device)
        statistics = {"sums": sums, "count": count, "valid": valid}
        for _ in range(2):  # micro-batches add up
            if fused:
                y = gated_activation(g, u if gated else None, mask, kind=kind, backend=backend, **statistics)
            else:
                h = reference.gated_activation(g, u if gated else None, kind=kind)
                y = gate(h, mask, backend="torch", **statistics)
            assert not sums.any() or _ == 1  # forward adds nothing
            torch.autograd.grad(y, g, upstream)
        return [y.detach(), sums, count]

    for name, ours, wanted in zip(("y", "sums", "count"), collected(True), collected(False), strict=True):
        close(name, ours, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("needs", [(True, False), (False, True)], ids=["g", "u"])
def test_each_subset_of_gradients_gives_the_same_bits(backend: str, needs: tuple[bool, bool], device: str) -> None:
    given, mask, upstream = operands((9, 40), torch.float32, device), halves(40, device), torch.randn(9, 40).to(device)
    whole = run(gated_activation, given, upstream, mask, torch.float32, kind="silu", backend=backend)
    leaves = [t.clone().requires_grad_(need) for t, need in zip(given, needs, strict=True)]
    y = gated_activation(*leaves, mask, kind="silu", backend=backend)
    y.backward(upstream)
    for leaf, need, wanted in zip(leaves, needs, whole[1:], strict=True):
        assert (leaf.grad is None) if not need else torch.equal(leaf.grad, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_do_not_matter_and_inputs_stay_as_they_were(backend: str, device: str) -> None:
    both, upstream = torch.randn(6, 2 * 24, device=device), torch.randn(24, 6, device=device).T
    mask = halves(48, device)[::2]
    g, u = both.chunk(2, -1)  # rows further apart than they are long
    want = run(gated_activation, [g.clone(), u.clone()], upstream.clone(), mask.clone(), g.dtype, kind="silu")
    for strided in ([g, u], [t.T.contiguous().T for t in (g, u)]):
        leaves = [t.detach().requires_grad_() for t in strided]  # no copy, the strides stay
        before = [t.detach().clone() for t in leaves]
        y = gated_activation(*leaves, mask, kind="silu", backend=backend)
        for name, got, wanted in zip("ygu", [y, *torch.autograd.grad(y, leaves, upstream)], want, strict=True):
            close(name, got.detach(), wanted)
        assert all(torch.equal(leaf, old) for leaf, old in zip(leaves, before, strict=True))
        assert y.data_ptr() not in {leaf.data_ptr() for leaf in leaves}


@pytest.mark.interpreted
@pytest.mark.parametrize("backend", BACKENDS)
def test_pruned_neurons_are_zero_and_the_rest_is_the_shrunk_op(backend: str, device: str) -> None:
    given, upstream = operands((5, 33), torch.float32, device), torch.randn(5, 33, device=device)
    mask = (torch.arange(33, device=device) % 3 > 0).float()
    kept = mask.bool()
    masked = run(gated_activation, given, upstream, mask, torch.float32, kind="gelu", backend=backend)
    few = [t[:, kept] for t in given]
    shrunk = run(gated_activation, few, upstream[:, kept], None, torch.float32, kind="gelu", backend=backend)
    for whole, part in zip(masked, shrunk, strict=True):
        assert not whole[:, ~kept].any()
        close("kept", whole[:, kept], part)
    none = run(gated_activation, given, upstream, 0 * mask, torch.float32, kind="gelu", backend=backend)
    assert not any(t.any() for t in none)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_and_a_checkpoint_give_the_same_bits(backend: str, device: str) -> None:
    g, u = (t.requires_grad_() for t in operands((270, 136), torch.float32, device))
    mask, upstream = halves(136, device), torch.randn(270, 136, device=device)

    def bits(recompute: bool) -> list[Tensor]:
        statistics = {"sums": torch.zeros(2, 136, device=device), "count": torch.zeros((), device=device)}

        def step(*given: Tensor) -> Tensor:
            return gated_activation(*given, mask, kind="silu", backend=backend, **statistics)

        y = checkpoint(step, g, u, use_reentrant=False) if recompute else step(g, u)
        return [y.detach(), *torch.autograd.grad(y, (g, u), upstream), *statistics.values()]

    first = bits(False)
    assert all(torch.equal(*pair) for again in (bits(False), bits(True)) for pair in zip(first, again, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str, device: str) -> None:
    g, u = (torch.randn(3, 4, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2))
    mask = torch.tensor([1.0, 0.0, 0.5, 1.0], dtype=torch.float64, device=device)
    assert torch.autograd.gradcheck(lambda g, u: gated_activation(g, u, mask, kind=kind), (g, u))


def test_what_backward_keeps_is_g_and_u(device: str) -> None:
    for backend in BACKENDS:
        g, u = (t.requires_grad_() for t in operands((8, 16), torch.float32, device))
        kept: set[int] = set()

        def pack(t: Tensor, kept: set[int] = kept) -> Tensor:
            kept.add(t.data_ptr() if t.dim() == 2 else 0)
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            gated_activation(g, u, halves(16, device), kind="silu", backend=backend)
        assert kept == {0, g.data_ptr(), u.data_ptr()}


@pytest.mark.interpreted
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "alone"])
def test_registered_ops_keep_the_rules(gated: bool, device: str) -> None:
    g, u, dy = (torch.randn(5, 24, device=device) for _ in range(3))
    mask, valid, ops = halves(24, device), torch.ones(5, device=device), torch.ops.apt_kernels
    given = (g, u, mask, valid) if gated else (g, None, None, None)
    torch.library.opcheck(ops.gated_activation_forward, (*given, "silu", gated, "triton"))
    torch.library.opcheck(ops.gated_activation_backward, (dy, *given, "silu", gated, True, gated, "triton"))


@pytest.mark.interpreted
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("collecting", [True, False], ids=["collecting", "bare"])
def test_one_graph_under_compile(backend: str, collecting: bool, device: str) -> None:
    g, u = (t.requires_grad_() for t in operands((5, 24), torch.float32, device))
    mask, upstream = halves(24, device), torch.randn(5, 24, device=device)

    def step(g: Tensor, u: Tensor, sums: Tensor, count: Tensor) -> Tensor:
        statistics = {"sums": sums, "count": count} if collecting else {}
        return gated_activation(g * 2, u, mask, kind="silu", backend=backend, **statistics) + 1

    def result(op: Any) -> list[Tensor]:
        statistics = torch.zeros(2, 24, device=device), torch.zeros((), device=device)
        y = op(g, u, *statistics)
        return [y.detach(), *torch.autograd.grad(y, (g, u), upstream), *statistics]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for name, got, wanted in zip(("y", "g", "u", "sums", "count"), result(compiled), result(step), strict=True):
        close(name, got, wanted)


def test_bad_input_names_the_dimensions() -> None:
    g = torch.zeros(2, 5, 4)
    for wrong, words in (
        ({"u": torch.zeros(2, 5, 3)}, r"u must be \[2, 5, 4\], got \[2, 5, 3\]"),
        ({"u": torch.zeros(2, 5, 4).half()}, "g is torch.float32 but u is torch.float16"),
        ({"mask": torch.ones(3)}, r"mask must be \[4\], got \[3\]"),
        ({"sums": torch.zeros(4), "count": torch.zeros(())}, r"sums must be \[2, 4\], got \[4\]"),
        ({"valid": torch.ones(5)}, r"valid must be \[2, 5\], got \[5\]"),
        ({"sums": torch.zeros(2, 4)}, "sums and count go together"),
        ({"kind": "relu"}, r"kind must be one of \['silu', 'gelu', 'gelu_tanh'\], got 'relu'"),
    ):
        with pytest.raises(ValueError, match="gated_activation: " + words):
            gated_activation(g, **{"kind": "silu", **wrong})
