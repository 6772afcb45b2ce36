"""masked_lora_linears: what layers on one input give one by one, with fewer passes over it."""

from typing import Any

import pytest
import torch
from check import close, no_worse_than_eager
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import apt_kernels
from apt_kernels import masked_lora_linears, reference, selection

SCALE = 0.7
# The other tests are in float32, on a GPU too.
DTYPES = [pytest.param(torch.float32, marks=pytest.mark.interpreted), torch.float16, torch.bfloat16]
BACKENDS = ("torch", *selection.KERNELS["masked_lora_linears"])
LAYERS = {  # outputs and rank of each
    "q, k, v": ((24, 5), (16, 0), (16, 20)),
    "gate, up": ((40, 8), (40, 8)),
    "alone": ((12, 3),),
    "no adapter": ((12, 0), (9, 0)),
}
Group = dict[str, Any]


def make_group(layers: str, lead: tuple[int, ...], I: int, dtype: torch.dtype, device: str, masked: bool) -> Group:
    def draw(*shape: int, over: int = 1, learns: bool = False) -> Tensor:
        values = torch.randn(*shape, dtype=torch.float64, device=device) / max(1, over) ** 0.5
        return values.to(dtype).requires_grad_(learns)

    sizes = LAYERS[layers]
    return {
        "x": draw(*lead, I, learns=True),
        "weights": [draw(O, I, over=max(I, O)) for O, _ in sizes],
        "a": [draw(R, I, over=max(I, R), learns=True) for _, R in sizes],
        "b": [draw(O, R, over=max(O, R), learns=True) for O, R in sizes],
        "biases": [None if number == 1 else draw(O) for number, (O, _) in enumerate(sizes)],
        "mask_in": torch.randint(0, 3, (I,), device=device).to(dtype) / 2 if masked else None,
        "upstreams": [draw(*lead, O, over=max(1, torch.Size(lead).numel())) for O, _ in sizes],
    }


def cast(group: Group, dtype: torch.dtype) -> Group:
    def one(value: Any) -> Any:
        if isinstance(value, list):
            return [one(item) for item in value]
        return None if value is None else value.detach().to(dtype).requires_grad_(value.requires_grad)

    return {name: one(value) for name, value in group.items()}


def results(outputs: list[Tensor], group: Group) -> dict[str, Tensor]:
    leaves = {"x": group["x"]} | {f"{k} {i}": t for k in "ab" for i, t in enumerate(group[k])}
    grads = torch.autograd.grad(outputs, list(leaves.values()), group["upstreams"], materialize_grads=True)
    ys = {f"y {i}": y.detach() for i, y in enumerate(outputs)}
    return ys | {f"grad of {name}": grad for name, grad in zip(leaves, grads, strict=True)}


def ours(group: Group, op: Any = masked_lora_linears, **more: Any) -> dict[str, Tensor]:
    named = {"scale": SCALE, "biases": group["biases"], "mask_in": group["mask_in"], **more}
    return results(op(group["x"], group["weights"], group["a"], group["b"], **named), group)


def one_by_one(group: Group) -> dict[str, Tensor]:
    layers = zip(group["weights"], group["a"], group["b"], group["biases"], strict=True)
    outputs = [
        reference.masked_lora_linear(group["x"], w, a, b, scale=SCALE, bias=bias, mask_in=group["mask_in"])
        for w, a, b, bias in layers
    ]
    return results(outputs, group)


@pytest.mark.pairs
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layers", LAYERS)
def test_equals_layer_by_layer(layers: str, dtype: torch.dtype, backend: str, device: str) -> None:
    for lead, I, masked in (((2, 19), 37, True), ((33,), 48, False), ((0,), 16, False)):
        group = make_group(layers, lead, I, dtype, device, masked)
        apt_kernels.reset_calls()
        got, eager, truth = ours(group, backend=backend), one_by_one(group), one_by_one(cast(group, torch.float64))
        ran = apt_kernels.calls()["masked_lora_linears"]
        assert ran == {backend: 1}
        for name in truth:
            no_worse_than_eager(name, got[name], eager[name], truth[name])


@pytest.mark.parametrize("backend", BACKENDS)
def test_unused_outputs_and_a_frozen_input(backend: str, device: str) -> None:
    group = make_group("q, k, v", (7,), 24, torch.float32, device, masked=False)
    y = masked_lora_linears(
        group["x"].detach(), group["weights"], group["a"], group["b"], scale=SCALE, backend=backend
    )[2]
    grad_a, grad_b = torch.autograd.grad(y, [group["a"][2], group["b"][2]], group["upstreams"][2])
    wanted = reference.masked_lora_linear(
        group["x"].detach(), group["weights"][2], group["a"][2], group["b"][2], scale=SCALE
    )
    truth = torch.autograd.grad(wanted, [group["a"][2], group["b"][2]], group["upstreams"][2])
    close("grad of a", grad_a, truth[0])
    close("grad of b", grad_b, truth[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_recomputed_is_equal_to_the_bit(backend: str, device: str) -> None:
    group = make_group("q, k, v", (3, 11), 24, torch.float32, device, masked=True)

    def recomputed(*args: Any, **named: Any) -> Any:
        return checkpoint(masked_lora_linears, *args, use_reentrant=False, **named)

    plain, again = ours(group, backend=backend), ours(group, recomputed, backend=backend)
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_registered_op_is_sound_and_compiles_whole(device: str) -> None:
    group = make_group("q, k, v", (6,), 16, torch.float32, device, masked=False)
    biases = [torch.zeros(0, device=device) if bias is None else bias for bias in group["biases"]]
    given = [*(group[name] for name in ("x", "weights", "a", "b")), biases]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        torch.ops.apt_kernels.masked_lora_linears.default, (*given, SCALE, "split_triton"), test_utils=tests
    )
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(masked_lora_linears, backend=counter, fullgraph=True)
    for backend in ("torch", "split_cublas"):
        got, wanted = ours(group, compiled, backend=backend), ours(group, backend=backend)
        for name in wanted:
            close(name, got[name], wanted[name])
    assert counter.frame_count == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"a": []}, "one of each a layer, got 3 weights, 0 a, 3 b"),
        ({"mask_in": torch.ones(3)}, r"mask_in must be \[24\], got \[3\]"),
        ({"b": [torch.zeros(24, 5), torch.zeros(16, 1), torch.zeros(16, 20)]}, r"b 1 must be \[16, 0\], got \[16, 1\]"),
        ({"weights": [torch.zeros(24, 24).double()] * 3}, "x is torch.float32 but weight 0 is torch.float64"),
        ({"weights": [torch.zeros(24, 24).requires_grad_()] * 3}, "weights and biases are frozen"),
    ],
)
def test_errors_name_what_is_wrong(change: dict[str, Any], words: str) -> None:
    group = make_group("q, k, v", (7,), 24, torch.float32, "cpu", masked=False) | change
    with pytest.raises(ValueError, match="masked_lora_linears: .*" + words):
        masked_lora_linears(group["x"], group["weights"], group["a"], group["b"], scale=1.0, mask_in=group["mask_in"])
