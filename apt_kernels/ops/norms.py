"""The public op of norms that know masks: checks and the choice of implementation."""

import math
from collections.abc import Callable
from typing import Literal

from torch import Tensor

from apt_kernels import eager
from apt_kernels.selection import by_kernels, require

_eager_norm: Callable[..., Tensor] = eager.MaskedNorm.apply  # torch leaves it untyped


def masked_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    eps: float,
    kind: Literal["layer", "rms"] = "layer",
    backend: str | None = None,
) -> Tensor:
    """LayerNorm or RMSNorm whose statistics weigh each dimension by its mask.

    ``n = sum m``, ``mean = sum m x / n``, ``var = sum m (x - mean)^2 / n`` (RMSNorm: ``mean = 0``), so that it equals
    the dense norm at m = 1, the norm of the kept dimensions at m in {0, 1}, and is continuous between.

    Args:
        x: ``[..., D]``.
        weight: ``[D]``.
        bias: ``[D]``, or None.
        mask: ``[D]``, 1 kept, 0 pruned, between while it decays; gets no gradient. None is all ones.
        eps: added to the variance.
        kind: "layer" or "rms".
        backend: forces an implementation; None chooses.

    Returns:
        ``[..., D]`` in the dtype of x; sums are kept in at least float32. Dropped dimensions are not zeroed.

    Raises:
        ValueError: shapes disagree or the kind is unknown.
    """
    D = x.shape[-1]
    require("masked_norm", {"weight": (weight, (D,)), "bias": (bias, (D,)), "mask": (mask, (D,))})
    if kind not in ("layer", "rms"):
        raise ValueError(f"masked_norm: kind must be 'layer' or 'rms', got {kind!r}")
    by_kernels("masked_norm", x, backend)
    y = _eager_norm(x.reshape(math.prod(x.shape[:-1]), D), weight, bias, mask, eps, kind == "layer")
    return y.view(x.shape)
