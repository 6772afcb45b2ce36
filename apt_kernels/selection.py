"""Which implementation and which tiles for which shape: a measured table, and heuristics where it is silent.

Decision 12: without a measurement the eager path runs. ``backend=`` or APT_BACKEND forces ``torch``, ``triton`` (the
kernels, the heuristics choosing among them) or one implementation by its name; what is forced never falls back.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apt_kernels import _triton

# Device name: what `python -m bench.kernels --tune` found there. Read here, so that nothing is read while compiling.
TABLES: dict[str, dict[str, Any]] = {
    path.stem.replace("_", " "): json.loads(path.read_text(encoding="utf-8"))
    for path in Path(__file__).with_name("tables").glob("*.json")
}
ONE_KERNEL_OUTPUTS, ONE_KERNEL_RANK = 2900, 16  # kernels.md 2: recomputing the rank-r product pays below both

KERNELS: dict[str, tuple[str, ...]] = {  # op: its implementations in Triton
    "masked_lora_linear": ("split_cublas", "split_triton", "one_kernel"),
    "masked_lora_linears": ("split_cublas", "split_triton"),
    **dict.fromkeys(("column_sums", "gate", "gated_activation", "masked_norm", "weight_kurtosis"), ("triton",)),
}

_calls: dict[str, dict[str, int]] = {}


def calls() -> dict[str, dict[str, int]]:
    """How often each implementation of each op ran since `reset_calls`: ``{op: {implementation: count}}``."""
    return {op: dict(counts) for op, counts in _calls.items()}


def reset_calls() -> None:
    """Set every counter of `calls` back to nothing."""
    _calls.clear()


def require(op: str, tensors: dict[str, tuple[Tensor | None, tuple[int, ...]]]) -> None:
    """ValueError where a tensor that is there has another shape than the op needs."""
    for name, (tensor, shape) in tensors.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{op}: {name} must be {list(shape)}, got {list(tensor.shape)}")


def count(op: str, implementation: str) -> None:
    """Note that an implementation ran. Kernels are counted where they are launched."""
    counts = _calls.setdefault(op, {})
    counts[implementation] = counts.get(implementation, 0) + 1


def by_kernels(op: str, x: Tensor, backend: str | None) -> bool:
    """Whether a call goes through the registered op, which chooses by `choose` when it runs; else it is eager's.

    Under torch.compile the eager path is traced and fused, the registered op stays whole.

    Raises:
        ValueError: a forced implementation does not exist or cannot take this tensor.
    """
    kernels = _registered(op, x, backend)
    if not kernels and not torch.compiler.is_compiling():  # a counter that changes would be a guard that fails
        count(op, "torch")
    return kernels


def chosen(op: str, x: Tensor, sizes: tuple[int, ...]) -> str:
    """The implementation that a call on x would run. Counts nothing.

    Args:
        op: name of the public op.
        x: its input, which tells device and dtype.
        sizes: what the table is looked up by, tokens first.

    Returns:
        Its name; "torch" is the eager path.
    """
    return choose(op, x, None, sizes) if _registered(op, x, None) else "torch"


def _registered(op: str, x: Tensor, backend: str | None) -> bool:
    forced = _forced(op, backend)
    if forced == "torch" or (forced is None and not (x.is_cuda and has_table(x.device))):
        return False
    reason = _triton.why_unusable(x)
    if forced is not None and reason:
        raise ValueError(f"{op}: backend {forced!r} is not available: {reason}")
    return reason is None


def _forced(op: str, backend: str | None) -> str | None:
    """The implementation that is forced on this op. APT_BACKEND may name one that only other ops have: then "triton".

    Raises:
        ValueError: there is none of that name.
    """
    asked = os.environ.get("APT_BACKEND")
    forced, known = backend or asked, KERNELS[op]
    if forced in (None, "torch", "triton", *known):
        return forced
    if forced == asked and any(forced in names for names in KERNELS.values()):
        return "triton"
    raise ValueError(f"{op}: backend {forced!r} is not available; choose one of {['torch', 'triton', *known]}")


def choose(op: str, x: Tensor, backend: str | None, sizes: tuple[int, ...]) -> str:
    """The implementation of a registered op that runs now, "torch" among them.

    Args:
        op: name of the public op.
        x: its input, which tells device and dtype.
        backend: forces one; None asks APT_BACKEND, then the table.
        sizes: what the table is looked up by, tokens first.
    """
    forced = _forced(op, backend)
    if forced is None:
        return measured(x.device).get(key(op, x.dtype, sizes), "torch")
    if forced != "triton":
        return forced
    if op == "masked_lora_linear":
        return _linear_heuristic(sizes)
    return KERNELS[op][0]


def _linear_heuristic(sizes: tuple[int, ...]) -> str:
    """Choose among the kernels of the linear op; sizes are tokens, inputs, outputs, rank (kernels.md 2 and 3.1)."""
    _, _, outputs, rank = sizes
    return "one_kernel" if outputs < ONE_KERNEL_OUTPUTS and rank <= ONE_KERNEL_RANK else "split_cublas"


def backend_of(device: torch.device) -> tuple[str, str]:
    """What runs on a device where a call forces nothing, and why.

    With a table the kernels run only where it names one; which, depends on the shape: `chosen` tells.

    Args:
        device: any of torch.

    Returns:
        "torch" or "triton", and the reason in words.

    Raises:
        ValueError: APT_BACKEND forces what does not exist, or what cannot run there.
    """
    forced = os.environ.get("APT_BACKEND")
    if forced is not None:
        x = torch.empty(0, device=device)
        for op in KERNELS:
            _registered(op, x, None)
        return ("torch" if forced == "torch" else "triton"), f"APT_BACKEND={forced} forces it"
    if device.type != "cuda":
        return "torch", "kernels need a GPU"
    name = torch.cuda.get_device_properties(device).name
    if not has_table(device):
        return "torch", f"no table of measurements for {name}"
    if not _triton.INSTALLED:
        return "torch", "triton is not installed"
    rows = measured(device).values()
    return "triton", f"by the table of {name}: at {sum(row != 'torch' for row in rows)} of {len(rows)} shapes"


def has_table(device: torch.device) -> bool:
    """Whether this device was measured."""
    return torch.cuda.get_device_properties(device).name in TABLES


def measured(device: torch.device) -> dict[str, str]:
    """The fastest implementation by `key`, where the device was measured."""
    return TABLES[torch.cuda.get_device_properties(device).name]["implementations"] if device.type == "cuda" else {}


def key(op: str, dtype: torch.dtype, sizes: tuple[int, ...]) -> str:
    """A row of the table: each size to its nearest power of two."""
    return " ".join([op, str(dtype)[6:], *(str(2 ** round(math.log2(size))) if size else "0" for size in sizes)])
