"""The public ops that collect what salience needs: checks and the choice of implementation."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from apt_kernels import eager
from apt_kernels.selection import by_kernels, require

_eager_gate: Callable[..., Tensor] = eager.Gate.apply  # torch leaves it untyped


def gate(
    h: Tensor,
    mask: Tensor | None = None,
    *,
    sums: Tensor | None = None,
    count: Tensor | None = None,
    valid: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Multiply by a unit mask and collect what salience needs.

    Returns ``h * m``. Where `sums` is given, the backward pass adds ``sum_t |h|`` to ``sums[0]``, ``sum_t |dL/dy|``
    (the upstream gradient at the gate's output) to ``sums[1]`` and the number of tokens to `count`, padding left out.

    Args:
        h: ``[..., D]``.
        mask: ``[D]``, 1 kept, 0 pruned, between while it decays; None is all ones.
        sums: ``[2, D]``, at least float32, accumulated in place.
        count: ``[]`` or ``[1]``, float, accumulated in place; required with `sums`.
        valid: 1 where a token is real, 0 where it is padding, the leading shape of h; None is all real.
        backend: forces an implementation; None chooses.

    Raises:
        ValueError: shapes disagree.
    """
    D = h.shape[-1]
    require("gate", {"mask": (mask, (D,)), "sums": (sums, (2, D)), "valid": (valid, tuple(h.shape[:-1]))})
    if (sums is None) != (count is None):
        raise ValueError("gate: sums and count go together; give both or neither")
    by_kernels("gate", h, backend)
    collect = sums is not None and torch.is_grad_enabled() and h.requires_grad
    y = _eager_gate(
        h.reshape(math.prod(h.shape[:-1]), D),
        mask,
        sums if collect else None,
        count if collect else None,
        valid.reshape(-1) if collect and valid is not None else None,
    )
    return y.view(h.shape)


def column_sums(x: Tensor, valid: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """``sum over tokens of |x|``: ``[D]`` in at least float32. `valid` has the leading shape of x; None is all real."""
    require("column_sums", {"valid": (valid, tuple(x.shape[:-1]))})
    by_kernels("column_sums", x, backend)
    x_TD = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return eager.column_sums(x_TD, None if valid is None else valid.reshape(-1))
