"""Facts about compiler, device and layout that the kernels and the public ops ask for. Importable without triton."""

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

Launcher = TypeVar("Launcher", bound=Callable[..., Any])

DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # what the kernels compute in; all else is eager's
INSTALLED = importlib.util.find_spec("triton") is not None
INTERPRETED_PROGRAMS = 4  # programs a split is planned for in the interpreter, which runs them one after the other


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors. Triton reads the variable when it is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_unusable(tensor: Tensor) -> str | None:
    """What keeps a kernel from taking this tensor, in words; None where nothing does."""
    if not INSTALLED:
        return "triton is not installed"
    if not tensor.is_cuda and not interpreted():
        return f"the tensor is on {tensor.device} (a GPU is needed, or TRITON_INTERPRET=1)"
    if tensor.dtype not in DTYPES:
        return f"kernels compute in {', '.join(str(dtype)[6:] for dtype in DTYPES)}, not {str(tensor.dtype)[6:]}"
    return None


def widened(dtype: torch.dtype) -> bool:
    """Whether a kernel must widen its tiles to float32 before any arithmetic: the interpreter gets bfloat16 wrong."""
    return interpreted() and dtype == torch.bfloat16


def precision(dtype: torch.dtype) -> str:
    """`input_precision` of tl.dot: float32 products are exact unless the user allowed TF32 for torch's own."""
    return "tf32" if dtype == torch.float32 and allows_tf32() else "ieee"


def allows_tf32() -> bool:
    """Whether torch's own float32 products may take TF32, by whichever of its two settings that was allowed.

    Since torch 2.9 the new one answers for both, while the old one raises where the new one was set.
    """
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):
        return matmul.fp32_precision == "tf32"
    return matmul.allow_tf32


def unit(*sizes: int) -> int:
    """8 where it divides every size and row stride (elements), else 1.

    Kernels take sizes as multiples of it (``size = units * UNIT``), so the compiler can prove that rows start at 16
    bytes, while a size that changes at run time never compiles anew.
    """
    return 8 if all(size % 8 == 0 for size in sizes) else 1


def rows_contiguous(tensor: Tensor) -> Tensor:
    """The tensor itself where its rows are contiguous, whatever lies between them; else a copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def contiguous(vector: Tensor | None) -> Tensor | None:
    """A vector that may be missing, as kernels take it."""
    return None if vector is None else vector.contiguous()


def capturing(device: torch.device) -> bool:
    """Whether what is launched on the device now goes into a CUDA graph, to be replayed with the same numbers."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@functools.cache
def programs(device: torch.device) -> int:
    """How many programs fill the device once: its multiprocessors. A split depends on shapes and on this alone."""
    return (
        torch.cuda.get_device_properties(device).multi_processor_count
        if device.type == "cuda"
        else INTERPRETED_PROGRAMS
    )


@functools.cache
def arch(device: torch.device) -> str:
    """The kind of machine that tiles are chosen for: interpreter, gfx942, or what `nvidia_arch` says."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    from triton.runtime import driver  # torch 2.6 does not tell the shared memory

    properties = driver.active.utils.get_device_properties(device.index)
    return nvidia_arch(torch.cuda.get_device_capability(device)[0], properties["max_shared_mem"])


def nvidia_arch(major: int, shared_bytes: int) -> str:
    """Whose tiles a chip gets, by the first number of its capability and the shared memory a program may have.

    sm_90 and sm_100 have 227 KB, sm_80 has 163 KB; sm_86, sm_89 and sm_120, whatever their generation, have 99 KB.
    """
    if shared_bytes < 160 * 1024:
        return "sm_89"
    if shared_bytes < 227 * 1024:
        return "sm_80"
    return "sm_90" if major == 9 else "sm_100"


def on_own_device(function: Launcher) -> Launcher:
    """Run a function that launches on the device of its first tensor: Triton launches on the current one."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with torch.cuda.device_of(next(arg for arg in args if isinstance(arg, Tensor))):
            return function(*args, **kwargs)

    return wrapped  # type: ignore[return-value]
