"""Kurtosis of the effective weight: float64, the facts of the method, and the pivots that power sums would lack."""

import pytest
import torch
from check import close, no_worse_than_eager
from torch import Tensor

import apt_kernels
from apt_kernels import reference, weight_kurtosis

BACKENDS = ["torch", "triton"]
SHAPES = [
    (1, 4, 2),
    (70, 36, 4),
    (64, 300, 1),
    (130, 136, 8),
]  # O, I, group: in a tile, ragged, past one


def operands(O: int, I: int, R: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    weight, c = torch.randn(O, I, device=device).to(dtype), torch.randn(I, device=device)
    low_rank = {"a": torch.randn(R, I, device=device) / 2, "b": torch.randn(O, R, device=device) / 2} if R else {}
    return {"weight": weight, "column_scale": c, **low_rank}


def stated(given: dict[str, Tensor], dtype: torch.dtype, group: int) -> tuple[Tensor, Tensor]:
    """The reference in a dtype."""
    weight, c, *low_rank = (t.to(dtype) for t in given.values())
    return reference.weight_kurtosis(weight, *low_rank, scale=0.5, group=group, column_scale=c)


@pytest.mark.pairs
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("R", [0, 1, 5, 24])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_meets_the_oracle(
    backend: str, dtype: torch.dtype, R: int, shape: tuple[int, int, int], device: str
) -> None:
    O, I, group = shape
    given = operands(O, I, R, dtype, device)
    apt_kernels.reset_calls()
    ours = weight_kurtosis(**given, scale=0.5, group=group, backend=backend)
    assert apt_kernels.calls() == {"weight_kurtosis": {backend: 1}}
    eager, truth = (stated(given, to, group) for to in (torch.float32, torch.float64))
    for name, *triple in zip(("group", "row"), ours, eager, truth, strict=True):
        no_worse_than_eager(name, *triple)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["the mean outweighs the deviation", "the first entry is an outlier"])
def test_power_sums_about_a_fixed_pivot_would_fail(backend: str, case: str, device: str) -> None:
    """About 0 where the mean is 100 deviations away; about the first entry where that is the heavy tail itself."""
    weight = torch.randn(4096, 12, device=device)
    if case == "the first entry is an outlier":
        weight[0] += 100
        pivot = weight[0]
    else:
        weight += 100
        pivot = torch.zeros(12, device=device)
    truth = reference.weight_kurtosis(weight.double())
    for ours, wanted in zip(weight_kurtosis(weight, backend=backend), truth, strict=True):
        assert ((ours - wanted).abs() / (wanted + 3)).max() < 1e-4
    m1, m2, m3, m4 = ((weight - pivot).pow(p).mean(0) for p in range(1, 5))
    fixed = (m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4) / (m2 - m1**2) ** 2 - 3
    assert ((fixed - truth[0]).abs() / (truth[0] + 3)).max() > 2e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_are_blocks_of_columns(backend: str, device: str) -> None:
    """One heavy-tailed head is found where it is; grouping by remainder, as the authors' code does, smears it."""
    weight = torch.randn(48, 4 * 16, device=device)
    weight[5, 2 * 16 + 3] = 60
    per_head, per_row = weight_kurtosis(weight, group=16, backend=backend)
    assert per_head.shape == (4,)
    assert per_row.shape == (48,)
    assert per_head.argmax() == 2
    assert per_row.argmax() == 5
    assert per_head[[0, 1, 3]].abs().max() < 1
    for head, ours in enumerate(per_head):
        block = weight[:, head * 16 : head * 16 + 16].double().flatten()
        z = (block - block.mean()) / block.std(correction=0)
        assert abs(ours.item() - ((z**4).mean() - 3).item()) < 1e-4 * (ours.item() + 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_scale_of_a_neuron_cancels_and_that_of_a_head_does_not(backend: str, device: str) -> None:
    weight, c = torch.randn(70, 24, device=device), torch.rand(24, device=device) + 0.5
    plain, scaled = (weight_kurtosis(weight, column_scale=s, backend=backend)[0] for s in (None, c))
    close("neurons", plain, scaled)
    plain, scaled = (weight_kurtosis(weight, group=8, column_scale=s, backend=backend)[0] for s in (None, c))
    assert (plain - scaled).abs().min() > 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_entries_and_no_entries_give_minus_three(backend: str, device: str) -> None:
    weight = torch.randn(6, 8, device=device)
    weight[:, 3] = weight[2] = 0.25
    per_column, per_row = weight_kurtosis(weight, backend=backend)
    assert per_column[3] == -3
    assert per_row[2] == -3
    for shape, group in (((0, 4), 2), ((3, 0), 1)):
        per_group, per_row = weight_kurtosis(torch.zeros(*shape, device=device), group=group, backend=backend)
        assert per_group.tolist() == [-3.0] * (shape[1] // group)
        assert per_row.tolist() == [-3.0] * shape[0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_do_not_matter_and_two_runs_give_the_same_bits(backend: str, device: str) -> None:
    given = operands(70, 36, 5, torch.float32, device)
    wide = {name: torch.cat([t, t], -1)[..., : t.shape[-1]] for name, t in given.items()}
    turned = {name: t.T.contiguous().T if t.dim() == 2 else t for name, t in given.items()}
    runs = [weight_kurtosis(**g, group=4, backend=backend) for g in (given, given, wide, turned)]
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    for run in runs[2:]:
        for a, b in zip(runs[0], run, strict=True):
            close("strided", a, b)


@pytest.mark.interpreted
def test_registered_op_keeps_the_rules(device: str) -> None:
    g = operands(20, 24, 5, torch.float32, device)
    arguments = (g["weight"], g["a"], g["b"], 0.5, 4, g["column_scale"], "triton")
    torch.library.opcheck(torch.ops.apt_kernels.weight_kurtosis, arguments)
    torch.library.opcheck(torch.ops.apt_kernels.weight_kurtosis, (g["weight"], None, None, 1.0, 1, None, "triton"))


def test_bad_input_names_the_dimensions() -> None:
    weight, a, b = torch.zeros(4, 6), torch.zeros(2, 6), torch.zeros(4, 2)
    for wrong, words in (
        ({"a": torch.zeros(2, 5), "b": b}, r"a must be \[2, 6\], got \[2, 5\]"),
        ({"a": a, "b": torch.zeros(4, 3)}, r"b must be \[4, 2\], got \[4, 3\]"),
        ({"a": a}, "a and b go together"),
        ({"column_scale": torch.ones(4)}, r"column_scale must be \[6\], got \[4\]"),
        ({"group": 4}, "group must divide the 6 columns of weight, got 4"),
    ):
        with pytest.raises(ValueError, match="weight_kurtosis: " + words):
            weight_kurtosis(weight, **wrong)
