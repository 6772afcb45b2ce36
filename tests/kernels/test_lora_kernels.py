"""masked_lora_linear by Triton kernels, in the interpreter where there is no GPU: numbers, gradients, memory, bits."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from check import close, no_worse_than_eager
from lora_cases import (
    EVERYTHING,
    LEARNT,
    OPTIONS,
    against_reference,
    call,
    cast,
    make_inputs,
    option_id,
    run,
    upstream_of,
)
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import apt_kernels
from apt_kernels import _triton, masked_lora_linear, reference, selection

IMPLEMENTATIONS = selection.KERNELS["masked_lora_linear"]
# Most other tests are in float32, on a GPU too.
HALF_AND_FULL = [pytest.param(torch.float32, marks=pytest.mark.interpreted), torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def counted() -> Iterator[None]:
    """Every test here must have run a kernel, and nothing else."""
    apt_kernels.reset_calls()
    yield
    counts = apt_kernels.calls()
    ran = {name for op in ("masked_lora_linear", "masked_lora_linear_backward") for name in counts.get(op, ())}
    assert ran, "no kernel ran"
    assert ran <= set(IMPLEMENTATIONS), f"not kernels alone, but {ran}"


@pytest.mark.pairs
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("options", OPTIONS, ids=option_id)
def test_every_combination_of_options(options: dict[str, Any], implementation: str, device: str) -> None:
    against_reference(make_inputs((5, 7), 37, 41, 5, device, **options), torch.float32, backend=implementation)


SHAPES = {  # leading shape of x, I, O; the tiles of the interpreter are 32 by 32
    "one token": ((1,), 16, 24),
    "3-D, aligned": ((2, 20), 48, 72),
    "ragged, past one tile": ((33,), 65, 129),
    "1-D": ((), 12, 10),
    "no tokens": ((0,), 16, 24),
    "no inputs": ((9,), 0, 24),
    "no outputs": ((9,), 16, 0),
}


@pytest.mark.pairs
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", HALF_AND_FULL, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape(shape: str, dtype: torch.dtype, implementation: str, device: str) -> None:
    lead, I, O = SHAPES[shape]
    gate = "row" if shape.startswith("ragged") else "rank"
    against_reference(make_inputs(lead, I, O, 5, device, **{**EVERYTHING, "gate": gate}), dtype, backend=implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("rank", [0, 1, 8, 16, 24, 64, 70])
def test_every_rank(rank: int, implementation: str, device: str) -> None:
    inputs = make_inputs((34,), 40, 36, rank, device, **{**EVERYTHING, "gate": "rank"})
    against_reference(inputs, torch.float16, backend=implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shut", ["mask_in", "mask_out"])
def test_all_zero_masks(shut: str, implementation: str, device: str) -> None:
    inputs = make_inputs((5,), 24, 16, 5, device, **EVERYTHING)
    inputs[shut] = torch.zeros_like(inputs[shut])
    against_reference(inputs, torch.float32, backend=implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("wanted", [("x",), ("a",), ("b",), ("gate",), ("x", "b"), ("a", "gate")], ids="+".join)
def test_only_the_gradients_asked_for(wanted: tuple[str, ...], implementation: str, device: str) -> None:
    inputs = cast(make_inputs((6,), 20, 28, 5, device, **{**EVERYTHING, "gate": "rank"}), torch.float32)
    upstream = upstream_of(inputs)
    truth = run(reference.masked_lora_linear, inputs, upstream)
    for name in LEARNT:
        inputs[name].requires_grad_(name in wanted)
    call(masked_lora_linear, inputs, backend=implementation).backward(upstream)
    for name in LEARNT:
        if name in wanted:
            close(name, inputs[name].grad, truth[f"grad of {name}"])
        else:
            assert inputs[name].grad is None


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("strided", ["view of a bigger weight", "transposed weight", "strided x", "expanded upstream"])
def test_strides(strided: str, implementation: str, device: str) -> None:
    inputs = cast(make_inputs((7,), 24, 16, 5, device, **EVERYTHING), torch.float32)
    upstream = upstream_of(inputs)
    if strided == "view of a bigger weight":
        bigger = torch.full((20, 30), float("nan"), device=device)
        bigger[:16, :24] = inputs["weight"]
        inputs["weight"] = bigger[:16, :24]
    elif strided == "transposed weight":
        inputs["weight"] = inputs["weight"].T.contiguous().T
    elif strided == "strided x":
        inputs["x"] = inputs["x"].detach().repeat_interleave(2, dim=1)[:, ::2].requires_grad_()
    else:
        upstream = upstream[:1].expand(7, 16)
    got = run(masked_lora_linear, inputs, upstream, backend=implementation)
    truth = run(reference.masked_lora_linear, inputs, upstream.contiguous())
    for name in truth:
        close(name, got[name], truth[name])


@pytest.fixture
def on_sm_90(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of sm_90 in the interpreter too; another GPU has no room for the persistent kernels."""
    if _triton.arch(torch.zeros(0, device=device).device) not in ("interpreter", "sm_90"):
        pytest.skip("needs the shared memory of sm_90")
    monkeypatch.setattr(_triton, "arch", lambda _: "sm_90")


@pytest.mark.parametrize("options", [{}, {"bias": 1, "mask_out": 1}, {"mask_in": 1, "gate": "row"}], ids=option_id)
@pytest.mark.usefixtures("on_sm_90")
def test_tensor_descriptors(options: dict[str, Any], device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The persistent kernels of sm_90: what has a mask in the way goes by pointers."""
    from apt_kernels import masked_lora, products

    launched = []
    launch = masked_lora.launch_fitting
    monkeypatch.setattr(
        masked_lora, "launch_fitting", lambda kernel, *a, **k: (launched.append(kernel), launch(kernel, *a, **k))
    )
    options = {"mask_in": 0, "mask_out": 0, "bias": 0, "gate": None, **options}
    against_reference(make_inputs((130,), 136, 264, 24, device, **options), torch.float16, backend="split_triton")
    described = {products.forward_tma, products.backward_tma}
    expected = {products.forward_tma} if options["mask_out"] else {products.backward_tma}
    assert described & set(launched) == (expected if options["mask_in"] or options["mask_out"] else described)


@pytest.mark.parametrize("what", ["upstream", "x", "weight", "a base between addresses"])
@pytest.mark.usefixtures("on_sm_90")
def test_what_has_no_descriptor_goes_by_pointers(what: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A descriptor's rows begin at 16 bytes and do not overlap, as those of an expanded tensor (stride 0) do."""
    from apt_kernels import masked_lora

    bases: list[Tensor] = []
    true_descriptor = masked_lora.described_by
    monkeypatch.setattr(
        masked_lora, "described_by", lambda tensor, *block: (bases.append(tensor), true_descriptor(tensor, *block))[1]
    )
    options = {"mask_in": 0, "mask_out": 0, "bias": 0, "gate": None}
    inputs = cast(make_inputs((130,), 136, 264, 24, device, **options), torch.float16)
    given = inputs | {"upstream": upstream_of(inputs)}
    if what in given:
        given[what] = given[what].detach()[:1].expand_as(given[what])
    else:
        room = given["x"].new_empty(given["x"].numel() + 1)
        given["x"] = room[1:].view_as(given["x"]).copy_(given["x"].detach())
    given["x"] = given["x"].detach().requires_grad_()
    upstream = given.pop("upstream")
    got = run(masked_lora_linear, given, upstream, backend="split_triton")
    eager = run(reference.masked_lora_linear, given, upstream)
    truth = run(reference.masked_lora_linear, cast(given, torch.float64), upstream)
    for name in truth:
        no_worse_than_eager(name, got[name], eager[name], truth[name])
    assert all(base.stride(0) >= base.shape[1] and base.data_ptr() % 16 == 0 for base in bases)
    assert bool(bases) == (what != "weight")  # which both directions read


def test_tokens_in_chunks_under_a_small_workspace(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from apt_kernels import passes

    monkeypatch.setattr(passes, "WORKSPACE", 3 * 32 * 16 * 4 * 2)  # chunks of 64 tokens for three blocks of outputs
    inputs = make_inputs((150,), 20, 70, 5, device, **{**EVERYTHING, "gate": "rank"})
    against_reference(inputs, torch.float32, backend="split_cublas")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_runs_and_recomputed_runs_are_equal_to_the_bit(implementation: str, device: str) -> None:
    inputs = cast(make_inputs((3, 30), 40, 56, 5, device, **EVERYTHING), torch.float16)
    upstream = upstream_of(inputs)

    def recomputed(*args: Tensor, **kwargs: Any) -> Any:
        return checkpoint(masked_lora_linear, *args, use_reentrant=False, **kwargs)

    more = {"dropout": 0.3, "seed": 1, "backend": implementation}
    first, second, third = (run(op, inputs, upstream, **more) for op in (masked_lora_linear,) * 2 + (recomputed,))
    for name in first:
        assert torch.equal(first[name], second[name]), name
        assert torch.equal(first[name], third[name]), name


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_dropout_by_seed(implementation: str, device: str) -> None:
    """On an op that is its rank product alone (W = 0, A = B = I), what is dropped can be read off the output."""
    T, R = 320, 8
    x = torch.randn(T, R, device=device).requires_grad_()
    eye = torch.eye(R, device=device)
    b, gate = eye.clone().requires_grad_(), torch.ones(T, R, device=device).requires_grad_()

    def op(p: float, seed: int | None) -> Tensor:
        more: dict[str, Any] = {"gate": gate, "dropout": p, "seed": seed, "backend": implementation}
        return masked_lora_linear(x, torch.zeros_like(eye), eye, b, scale=1.0, **more)

    y = op(0.25, 3)
    assert torch.equal(y, op(0.25, 3))
    assert not torch.equal(y, op(0.25, 4))
    close("nothing dropped", op(0.0, None), x)
    kept = y != 0
    close("kept entries", y[kept], x[kept] / 0.75)
    assert abs(kept.double().mean().item() - 0.75) < 0.03
    upstream = torch.randn_like(y) / T**0.5
    grad_x, grad_b, grad_gate = torch.autograd.grad(y, [x, b, gate], upstream)
    close("grad of x", grad_x, upstream * kept / 0.75)
    close("grad of b", grad_b, upstream.T @ y.detach())
    close("grad of gate", grad_gate, upstream * y.detach())


@pytest.mark.interpreted
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_adapters_in_float32_over_a_float16_base(implementation: str, device: str) -> None:
    inputs = cast(make_inputs((7,), 16, 24, 5, device, **{**EVERYTHING, "gate": "rank"}), torch.float16)
    wide = {k: inputs[k].detach().float().requires_grad_() for k in ("a", "b", "gate")}
    got = run(masked_lora_linear, inputs | wide, upstream_of(inputs), backend=implementation)
    assert {name for name, t in got.items() if t.dtype == torch.float16} == {"y", "grad of x"}
    assert {got[f"grad of {k}"].dtype for k in wide} == {torch.float32}


def test_autocast(device: str) -> None:
    inputs = cast(make_inputs((3, 7), 16, 24, 5, device, **EVERYTHING), torch.float32)
    with torch.autocast(device, dtype=torch.bfloat16):
        got = run(masked_lora_linear, inputs, upstream_of(inputs), backend="split_triton")
    assert got.pop("y").dtype == torch.bfloat16
    assert {t.dtype for t in got.values()} == {torch.float32}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("rank", [5, 16, 24])
def test_saved_for_backward_beyond_x(rank: int, implementation: str, device: str) -> None:
    """Goal G10: at most the padded rank-R product in 16 bits and 1 KiB."""
    T, padded = 50, -(-rank // 16) * 16
    inputs = cast(make_inputs((T,), 16, 24, rank, device, **EVERYTHING), torch.float16)
    shared = {t.data_ptr() for t in inputs.values() if t is not None}
    fresh: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in shared:
            fresh[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        call(masked_lora_linear, inputs, backend=implementation)
    assert T * rank * 2 <= sum(fresh.values()) <= T * padded * 2 + 1024


def arguments(device: str, rank: int = 5) -> tuple[Any, ...]:
    inputs = cast(make_inputs((6,), 16, 24, rank, device, **{**EVERYTHING, "gate": "rank"}), torch.float32)
    return (*inputs.values(), 0.7, 0.0, 0)


@pytest.mark.interpreted
def test_registered_op_is_sound(device: str) -> None:
    x, weight, a, b, bias, gate, mask_in, mask_out, *settings = arguments(device)
    given = (x, weight, a, b, bias, gate, mask_in, mask_out, *settings, "split_triton")
    torch.library.opcheck(torch.ops.apt_kernels.masked_lora_linear.default, given)
    y, z = torch.ops.apt_kernels.masked_lora_linear(*given)
    plain = [t.detach() for t in (torch.randn_like(y), x, z, weight, a, b, gate, mask_in, mask_out)]
    for needs in ([True] * 4, [False, True, False, False]):
        backward = (*plain, *settings, "split_triton", needs)
        torch.library.opcheck(torch.ops.apt_kernels.masked_lora_linear_backward.default, backward)


def test_compiled_whole_with_two_graphs_for_six_ranks(device: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def op(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, upstream: Tensor) -> Tensor:
        return (masked_lora_linear(x, weight, a, b, scale=0.7, backend="split_cublas") * upstream).sum()

    compiled = torch.compile(op, backend=counter, fullgraph=True)
    for rank in (8, 16, 24, 32, 48, 64):
        x, weight, a, b, *_ = arguments(device, rank)
        upstream = torch.randn(6, 24, device=device)
        wanted = torch.autograd.grad(op(x, weight, a, b, upstream), [x, a, b])
        got = torch.autograd.grad(compiled(x, weight, a, b, upstream), [x, a, b])
        for name, ours, theirs in zip("xab", got, wanted, strict=True):
            close(name, ours, theirs)
    assert counter.frame_count <= 2
