"""Two comparisons for every test, and the one table of tolerances. None is ever loosened to get green."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

# What an op may err beyond eager PyTorch in the same dtype, for values of unit variance.
SLACK = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
# How far two ways to the same number may part, over max(1, |number|).
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


def no_worse_than_eager(name: str, got: Tensor, eager: Tensor, truth: Tensor) -> None:
    """`truth` is the reference in float64, `eager` the same reference in the dtype of `got`."""
    assert got.shape == truth.shape, f"{name}: {tuple(got.shape)} instead of {tuple(truth.shape)}"
    assert got.dtype == eager.dtype, f"{name}: {got.dtype} instead of {eager.dtype}"
    if got.numel() == 0:
        return
    assert torch.isfinite(got).all(), f"{name}: non-finite"
    allowed = (eager.double() - truth).abs() + SLACK[got.dtype] * truth.abs().clamp(min=1.0)
    excess = ((got.double() - truth).abs() - allowed).max().item()
    assert excess <= 0, f"{name}: {excess:.2e} beyond eager's own error, {tuple(got.shape)}, {got.dtype}"


def close(name: str, got: Tensor, wanted: Tensor) -> None:
    """Equal up to the order of additions."""
    assert got.shape == wanted.shape, f"{name}: {tuple(got.shape)} instead of {tuple(wanted.shape)}"
    assert got.dtype == wanted.dtype, f"{name}: {got.dtype} instead of {wanted.dtype}"
    if got.numel() == 0:
        return
    assert torch.isfinite(got).all(), f"{name}: non-finite"
    apart = ((got - wanted).abs() / wanted.abs().clamp(min=1.0)).max().item()
    assert apart <= TOLERANCE[got.dtype], f"{name}: {apart:.2e} apart, {tuple(got.shape)}, {got.dtype}"


class Unrounded(TorchFunctionMode):
    """Inside, float64 stays so where a family asks for float32, as norms and softmax do whatever the model is."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float or (func is Tensor.to and args[1:] == (torch.float32,)):
                return args[0]
            if func is F.softmax and kwargs.get("dtype") == torch.float32:
                kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)
