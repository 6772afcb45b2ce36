"""masked_lora_linear: the reference's numbers and gradients, no more work and memory than promised, clear errors."""

from itertools import combinations
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
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from apt_kernels import masked_lora_linear, reference

# leading shape of x, I, O, R
SHAPES = {
    "one token": ((1,), 16, 24, 8),
    "odd": ((7,), 13, 11, 5),
    "ragged": ((33,), 65, 129, 5),
    "3-D": ((2, 5), 24, 40, 8),
    "1-D": ((), 12, 10, 2),
    "wide rank": ((9,), 16, 16, 40),
    "no rank": ((9,), 16, 24, 0),
    "no inputs": ((9,), 0, 24, 4),
    "no outputs": ((9,), 16, 0, 4),
    "no tokens": ((0,), 16, 24, 4),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=option_id)
def test_every_combination_of_options(options: dict[str, Any], dtype: torch.dtype, device: str) -> None:
    against_reference(make_inputs((3, 7), 20, 28, 5, device, **options), dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape(shape: str, dtype: torch.dtype, device: str) -> None:
    for gate in ("rank", "row"):
        against_reference(make_inputs(*SHAPES[shape], device, **{**EVERYTHING, "gate": gate}), dtype)


@pytest.mark.parametrize("strided", ["view of a bigger weight", "transposed weight", "strided x", "expanded upstream"])
def test_strides(strided: str, device: str) -> None:
    inputs = cast(make_inputs((7,), 13, 11, 5, device, **EVERYTHING), torch.float64)
    upstream = upstream_of(inputs)
    if strided == "view of a bigger weight":
        bigger = torch.full((20, 30), float("nan"), dtype=torch.float64, device=device)
        bigger[:11, :13] = inputs["weight"]
        inputs["weight"] = bigger[:11, :13]
    elif strided == "transposed weight":
        inputs["weight"] = inputs["weight"].T.contiguous().T
    elif strided == "strided x":
        inputs["x"] = inputs["x"].detach().repeat_interleave(2, dim=1)[:, ::2].requires_grad_()
    else:
        upstream = upstream[:1].expand(7, 11)
    got = run(masked_lora_linear, inputs, upstream)
    truth = run(reference.masked_lora_linear, inputs, upstream.contiguous())
    for name in truth:
        close(name, got[name], truth[name])


def test_new_ranks_over_zero_columns_of_b_leave_the_output(device: str) -> None:
    inputs = make_inputs((7,), 13, 11, 5, device, **{**EVERYTHING, "gate": None})
    before = call(masked_lora_linear, inputs)
    inputs["a"] = torch.cat([inputs["a"], torch.randn_like(inputs["a"])])
    inputs["b"] = torch.cat([inputs["b"], torch.zeros_like(inputs["b"])], dim=1)
    close("y", call(masked_lora_linear, inputs), before)


SUBSETS = [subset for size in range(1, 5) for subset in combinations(LEARNT, size)]


@pytest.mark.parametrize("wanted", SUBSETS, ids="+".join)
def test_only_the_gradients_asked_for_are_computed(wanted: tuple[str, ...], device: str) -> None:
    T, I, O, R = 6, 20, 28, 5
    inputs = cast(make_inputs((T,), I, O, R, device, **{**EVERYTHING, "gate": "rank"}), torch.float64)
    upstream = upstream_of(inputs)
    truth = run(reference.masked_lora_linear, inputs, upstream)
    for name in LEARNT:
        inputs[name].requires_grad_(name in wanted)
    y = call(masked_lora_linear, inputs)
    with FlopCounterMode(display=False) as counter:
        y.backward(upstream)
    for name, tensor in inputs.items():
        if name in wanted:
            close(name, tensor.grad, truth[f"grad of {name}"])
        else:
            assert tensor.grad is None
    # dB, the gradient of the rank product, dA, dx; the in-place product that completes dx is not in torch's table.
    products = T * O * R * ("b" in wanted) + T * O * R * bool({"x", "a", "gate"} & set(wanted))
    products += T * I * R * ("a" in wanted) + T * O * I * ("x" in wanted)
    assert counter.get_total_flops() == 2 * products


@pytest.mark.parametrize("gate", ["rank", "row"])
def test_gradcheck(gate: str, device: str) -> None:
    inputs = cast(make_inputs((2, 3), 5, 4, 3, device, **{**EVERYTHING, "gate": gate}), torch.float64)

    def op(*learnt: Tensor) -> Tensor:
        return call(masked_lora_linear, inputs | dict(zip(LEARNT, learnt, strict=True)), dropout=0.4, seed=5)

    assert torch.autograd.gradcheck(op, [inputs[name] for name in LEARNT])


def test_dropout_by_seed(device: str) -> None:
    """On an op that is its rank product alone (W = 0, A = B = I), what is dropped can be read off the output."""
    T, R = 2000, 4
    x = torch.randn(T, R, dtype=torch.float64, device=device).requires_grad_()
    eye = torch.eye(R, dtype=torch.float64, device=device)
    b, gate = eye.clone().requires_grad_(), torch.ones(T, R, dtype=torch.float64, device=device).requires_grad_()

    def op(p: float, seed: int | None) -> Tensor:
        return masked_lora_linear(x, torch.zeros_like(eye), eye, b, scale=1.0, gate=gate, dropout=p, seed=seed)

    y = op(0.25, 3)
    assert torch.equal(y, op(0.25, 3))
    assert not torch.equal(y, op(0.25, 4))
    assert torch.equal(op(0.0, None), x)
    kept = y != 0
    close("kept entries", y[kept], x[kept] / 0.75)
    assert abs(kept.double().mean().item() - 0.75) < 0.02
    upstream = torch.randn_like(y)
    grad_x, grad_b, grad_gate = torch.autograd.grad(y, [x, b, gate], upstream)
    close("grad of x", grad_x, upstream * kept / 0.75)
    close("grad of b", grad_b, upstream.T @ y.detach())
    close("grad of gate", grad_gate, upstream * y.detach())


def test_dropout_leaves_the_global_random_state(device: str) -> None:
    inputs = make_inputs((4,), 6, 5, 2, device, **EVERYTHING)
    before = torch.get_rng_state()
    call(masked_lora_linear, inputs, dropout=0.5, seed=1)
    assert torch.equal(before, torch.get_rng_state())


def test_second_backward_is_equal_and_nothing_given_is_written(device: str) -> None:
    inputs = cast(make_inputs((7,), 13, 11, 5, device, **EVERYTHING), torch.float64)
    y = call(masked_lora_linear, inputs, dropout=0.3, seed=1)
    given = {**inputs, "upstream": upstream_of(inputs)}
    before = {k: t.detach().clone() for k, t in given.items()}
    leaves = [inputs[name] for name in LEARNT]
    first, second = (torch.autograd.grad(y, leaves, given["upstream"], retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(given[k], before[k]) for k in given)


def test_adapters_in_float32_over_a_bfloat16_base(device: str) -> None:
    narrow = cast(make_inputs((7,), 13, 11, 5, device, **EVERYTHING), torch.bfloat16)
    wide = {k: narrow[k].detach().float().requires_grad_() for k in ("a", "b", "gate")}
    upstream = upstream_of(narrow)
    got = run(masked_lora_linear, narrow | wide, upstream)
    assert {name for name, t in got.items() if t.dtype == torch.bfloat16} == {"y", "grad of x"}
    eager = run(reference.masked_lora_linear, cast(narrow, torch.bfloat16), upstream)
    truth = run(reference.masked_lora_linear, cast(narrow, torch.float64), upstream)
    for name in truth:
        no_worse_than_eager(name, got[name].bfloat16(), eager[name], truth[name])


def test_autocast(device: str) -> None:
    inputs = cast(make_inputs((3, 7), 20, 28, 5, device, **EVERYTHING), torch.float32)
    upstream = upstream_of(inputs)
    with torch.autocast(device, dtype=torch.bfloat16):
        got = run(masked_lora_linear, inputs, upstream)
    assert got.pop("y").dtype == torch.bfloat16
    assert {t.dtype for t in got.values()} == {torch.float32}
    eager = run(reference.masked_lora_linear, cast(inputs, torch.bfloat16), upstream)
    truth = run(reference.masked_lora_linear, cast(inputs, torch.float64), upstream)
    for name, grad in got.items():
        no_worse_than_eager(name, grad.bfloat16(), eager[name], truth[name])


@pytest.mark.parametrize("options", [EVERYTHING, {**EVERYTHING, "gate": None, "mask_in": 0}], ids=option_id)
def test_saves_nothing_but_x_the_rank_product_and_parameters(options: dict[str, Any], device: str) -> None:
    T, R = 50, 5
    inputs = cast(make_inputs((T,), 20, 28, R, device, **options), torch.float32)
    shared = {t.data_ptr() for t in inputs.values() if t is not None}
    fresh: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in shared:
            fresh.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        call(masked_lora_linear, inputs, dropout=0.2, seed=1)
    assert sum(t.numel() * t.element_size() for t in fresh) == T * R * 4


def test_checkpointing_changes_no_bit(device: str) -> None:
    inputs = cast(make_inputs((3, 7), 20, 28, 5, device, **EVERYTHING), torch.float32)
    upstream = upstream_of(inputs)

    def recomputed(*args: Tensor, **kwargs: Any) -> Any:
        return checkpoint(masked_lora_linear, *args, use_reentrant=False, **kwargs)

    plain = run(masked_lora_linear, inputs, upstream, dropout=0.3, seed=1)
    again = run(recomputed, inputs, upstream, dropout=0.3, seed=1)
    assert all(torch.equal(plain[name], again[name]) for name in plain)
