"""What the registered ops share: which module computes, and what stands for a tensor that is not there."""

from typing import Any

import torch
from torch import Tensor

from apt_kernels import eager, selection


def computed_by(op: str, x: Tensor, backend: str | None) -> Any:
    """The module whose function runs now, eager's or the kernels', which are imported here. Counts it."""
    name = selection.choose(op, x, backend, tuple(x.shape))
    selection.count(op, name)
    if name == "torch":
        return eager
    from apt_kernels import activation, kurtosis, norms, statistics

    kernels = {"gated_activation": activation, "masked_norm": norms, "weight_kurtosis": kurtosis}
    return kernels.get(op, statistics)


def or_empty(tensor: Tensor | None, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor, or an empty one: a registered op gives no None."""
    return like.new_empty(0, dtype=dtype) if tensor is None else tensor
