"""The public face of the ops: every refusal names the dimensions, counters prove what ran."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.utils.import_utils import enable_tf32

import apt_kernels
from apt_kernels import _triton, masked_lora_linear, weight_kurtosis


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(3, 5)}, r"x must be \[3, 6\], got \[3, 5\]"),
        ({"a": torch.zeros(2, 5)}, r"a must be \[2, 6\], got \[2, 5\]"),
        ({"b": torch.zeros(4, 3)}, r"b must be \[4, 2\], got \[4, 3\]"),
        ({"bias": torch.zeros(6)}, r"bias must be \[4\], got \[6\]"),
        ({"mask_in": torch.ones(4)}, r"mask_in must be \[6\], got \[4\]"),
        ({"mask_out": torch.ones(6)}, r"mask_out must be \[4\], got \[6\]"),
        ({"gate": torch.ones(3)}, r"gate must be \[2\], got \[3\]"),
        ({"gate": torch.ones(2, 2)}, r"gate must be \[3, 2\], got \[2, 2\]"),
        ({"weight": torch.zeros(4, 6).double()}, "x is torch.float32 but weight is torch.float64"),
        ({"weight": torch.zeros(4, 6).requires_grad_()}, "weight and bias are frozen"),
        ({"bias": torch.zeros(4).requires_grad_()}, "weight and bias are frozen"),
        ({"dropout": 1.0, "seed": 1}, r"dropout must be in \[0, 1\)"),
        ({"dropout": -0.1, "seed": 1}, r"dropout must be in \[0, 1\)"),
        ({"dropout": 0.5}, "needs a seed, got dropout=0.5, seed=None"),
        ({"backend": "cuda"}, "backend 'cuda' is not available; choose one of"),
    ],
)
def test_errors_name_what_is_wrong(change: dict[str, Any], words: str) -> None:
    good = {"x": torch.zeros(3, 6), "weight": torch.zeros(4, 6), "a": torch.zeros(2, 6), "b": torch.zeros(4, 2)}
    with pytest.raises(ValueError, match="masked_lora_linear: .*" + words):
        masked_lora_linear(**{**good, "scale": 1.0, **change})


def test_calls_are_counted_and_a_forced_backend_never_falls_back(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    inputs = tuple(torch.zeros(*shape, device=device) for shape in ((3, 6), (4, 6), (2, 6), (4, 2)))
    apt_kernels.reset_calls()
    assert apt_kernels.calls() == {}
    for _ in range(2):
        masked_lora_linear(*inputs, scale=1.0)
    masked_lora_linear(*inputs, scale=1.0, backend="torch")
    apt_kernels.gate(inputs[0])
    counted = {"masked_lora_linear": {"torch": 3}, "gate": {"torch": 1}}
    assert apt_kernels.calls() == counted
    monkeypatch.setenv("APT_BACKEND", "triton")
    double = tuple(t.double() for t in inputs)
    for call in (lambda: masked_lora_linear(*double, scale=1.0), lambda: apt_kernels.gate(double[0])):
        with pytest.raises(ValueError, match="backend 'triton' is not available: kernels compute in float32"):
            call()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="backend 'triton' is not available: the tensor is on cpu"):
        masked_lora_linear(*(t.cpu() for t in inputs), scale=1.0)
    assert apt_kernels.calls() == counted


def test_a_name_of_one_op_forces_the_kernels_of_the_others(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    x = torch.zeros(6, 6, device=device)
    monkeypatch.setenv("APT_BACKEND", "one_kernel")
    apt_kernels.reset_calls()
    masked_lora_linear(x, torch.zeros_like(x), x[:2], x[:, :2], scale=1.0)
    apt_kernels.gate(x, x[0])
    assert apt_kernels.calls() == {"masked_lora_linear": {"one_kernel": 1}, "gate": {"triton": 1}}
    with pytest.raises(ValueError, match="gate: backend 'split_cublas' is not available; choose one of"):
        apt_kernels.gate(x, x[0], backend="split_cublas")
    monkeypatch.setenv("APT_BACKEND", "two_kernels")
    with pytest.raises(ValueError, match="gate: backend 'two_kernels' is not available; choose one of"):
        apt_kernels.gate(x, x[0])


@pytest.mark.parametrize("forced", [None, "torch", "triton", "split_triton"])
def test_chosen_tells_what_would_run(forced: str | None, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    if forced is not None:
        monkeypatch.setenv("APT_BACKEND", forced)
    x = torch.zeros(6, 6, device=device)
    apt_kernels.reset_calls()
    sizes = {"gate": (6, 6), "masked_lora_linear": (6, 6, 6, 2)}
    named = {op: apt_kernels.chosen(op, x, of_op) for op, of_op in sizes.items()}
    assert apt_kernels.calls() == {}
    apt_kernels.gate(x, x[0])
    masked_lora_linear(x, torch.zeros_like(x), x[:2], x[:, :2], scale=1.0)
    assert apt_kernels.calls() == {op: {name: 1} for op, name in named.items()}


@pytest.fixture
def tf32_as_before() -> Iterator[None]:
    yield
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "none"


def allow_by_old_flag() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True


def allow_by_new_setting() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"


def allow_for_all_but_products() -> None:
    torch.backends.fp32_precision = "tf32"
    torch.backends.cuda.matmul.fp32_precision = "ieee"


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch has one setting yet")
@pytest.mark.usefixtures("tf32_as_before")
@pytest.mark.parametrize(
    ("allow", "wanted"),
    [
        (lambda: None, "ieee"),
        (allow_by_old_flag, "tf32"),
        (allow_by_new_setting, "tf32"),
        (lambda: enable_tf32(True), "tf32"),  # what `TrainingArguments(tf32=True)` does
        (lambda: enable_tf32(False), "ieee"),
        (lambda: torch.set_float32_matmul_precision("high"), "tf32"),
        (allow_for_all_but_products, "ieee"),
    ],
)
def test_tf32_is_taken_where_torch_takes_it(allow: Callable[[], None], wanted: str, device: str) -> None:
    allow()
    assert _triton.precision(torch.float32) == wanted
    assert _triton.precision(torch.float16) == "ieee"
    weight, a, b = (torch.zeros(*shape, device=device) for shape in ((4, 8), (2, 8), (4, 2)))
    per_column, _ = weight_kurtosis(weight, a, b, backend="triton")
    assert (per_column == -3).all()


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("major", "shared_bytes", "tiles"),
    [
        (9, 232448, "sm_90"),
        (10, 232448, "sm_100"),
        (8, 166912, "sm_80"),
        (8, 101376, "sm_89"),  # and sm_86
        (12, 101376, "sm_89"),  # younger than sm_90, with less than half its shared memory
    ],
)
def test_tiles_are_chosen_by_shared_memory(
    major: int, shared_bytes: int, tiles: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = pytest.importorskip("triton.runtime")
    utils = SimpleNamespace(get_device_properties=lambda index: {"max_shared_mem": shared_bytes})
    monkeypatch.setattr(runtime, "driver", SimpleNamespace(active=SimpleNamespace(utils=utils)))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    assert _triton.arch.__wrapped__(torch.device("cuda", 0)) == tiles


def test_dropout_in_a_captured_graph_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake tensors say they are on a GPU, and are none."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with FakeTensorMode():
        inputs = [torch.zeros(*shape, device="cuda") for shape in ((3, 6), (4, 6), (2, 6), (4, 2))]
        with pytest.raises(ValueError, match=r"masked_lora_linear: dropout=0\.5 in a CUDA graph would drop the same"):
            masked_lora_linear(*inputs, scale=1.0, dropout=0.5, seed=1)
    on_cpu = [torch.zeros(*shape) for shape in ((3, 6), (4, 6), (2, 6), (4, 2))]
    assert masked_lora_linear(*on_cpu, scale=1.0, dropout=0.5, seed=1).shape == (3, 4)  # that is not captured
