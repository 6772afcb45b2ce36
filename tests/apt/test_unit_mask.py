"""The gate before an adapted linear: the op takes the mask over where nothing else is asked of the gate."""

import pytest
import torch
from check import close
from torch import Tensor, nn

import apt_kernels
from apt.layers import APTAdapter
from apt.layers.passes import ValidTokens
from apt.layers.unit_mask import UnitMask

UNITS, SIZE, OUT, TOKENS = 6, 4, 20, 10


def gated(rank: int, **kind: torch.dtype) -> APTAdapter:
    adapter = APTAdapter(nn.Linear(UNITS * SIZE, OUT, **kind), rank, unit_mask=UnitMask(UNITS, SIZE, ValidTokens()))
    if adapter.lora_B is not None:
        nn.init.normal_(adapter.lora_B)
    assert adapter.unit_mask is not None
    adapter.unit_mask.set_mask(torch.tensor([1.0, 0.0, 0.3, 1.0, 0.9, 0.0]))
    return adapter


def outputs(adapter: APTAdapter, x: Tensor, upstream: Tensor, *, apart: bool) -> dict[str, Tensor]:
    """Output and gradients; `apart`: the gate before the linear, a pass of its own."""
    x = x.detach().requires_grad_()
    gate = adapter.unit_mask
    assert gate is not None
    if apart:
        adapter.unit_mask = None
    y = adapter(gate(x) if apart else x)
    adapter.unit_mask = gate
    learnt = {"x": x, **{name: p for name, p in adapter.named_parameters() if p.requires_grad}}
    grads = torch.autograd.grad(y, list(learnt.values()), upstream)
    return {"y": y.detach(), **dict(zip(learnt, grads, strict=True))}


@pytest.mark.parametrize("rank", [0, 5])
@pytest.mark.parametrize("collecting", [False, True], ids=["masks alone", "collecting"])
def test_equals_a_gate_before_the_linear(rank: int, collecting: bool) -> None:
    adapter = gated(rank, dtype=torch.float64)
    gate = adapter.unit_mask
    assert gate is not None
    gate.collecting = collecting
    x = torch.randn(2, TOKENS, UNITS * SIZE, dtype=torch.float64)
    upstream = torch.randn(2, TOKENS, OUT, dtype=torch.float64)
    wanted = outputs(adapter, x, upstream, apart=True)
    sums, count = gate.sums.clone(), gate.count.clone()
    gate.reset_sums()
    got = outputs(adapter, x, upstream, apart=False)
    for name, value in wanted.items():
        close(name, got[name], value)
    close("statistics", gate.sums, sums)
    assert gate.count == count == (2 * TOKENS if collecting else 0)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(("rank", "collecting", "passes"), [(5, False, 0), (5, True, 1), (0, False, 1)])
def test_the_mask_alone_takes_no_pass_of_its_own(
    rank: int, collecting: bool, passes: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("APT_BACKEND", backend)
    adapter = gated(rank)
    assert adapter.unit_mask is not None
    adapter.unit_mask.collecting = collecting
    apt_kernels.reset_calls()
    adapter(torch.randn(TOKENS, UNITS * SIZE, requires_grad=True))
    assert sum(apt_kernels.calls().get("gate", {}).values()) == passes


def test_only_shut_gates_mask() -> None:
    adapter = gated(5)
    gate = adapter.unit_mask
    assert gate is not None
    assert gate.only_masks
    gate.collecting = True
    assert not gate.only_masks
    with torch.no_grad():
        assert gate.only_masks
    gate.set_mask(torch.ones(UNITS))
    gate.collecting = False
    assert not gate.only_masks
    gate.set_mask(torch.zeros(UNITS))
    gate.keep(torch.tensor([], dtype=torch.long))
    gate.collecting = True
    assert not gate.only_masks
    assert not gate.collects
