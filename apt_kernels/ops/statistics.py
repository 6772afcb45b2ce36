"""The public ops that collect what salience needs: checks, the choice of implementation, registered ops, autograd."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from apt_kernels import eager, selection
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

    Where `sums` is given, the backward pass adds ``sum_t |h|`` to ``sums[0]``, ``sum_t |dL/dy|``
    (the upstream gradient at the gate's output) to ``sums[1]`` and the number of tokens to `count`, padding left out.

    Args:
        h: ``[..., D]``.
        mask: ``[D]``, 1 kept, 0 pruned, between while it decays; None is all ones.
        sums: ``[2, D]``, at least float32, accumulated in place.
        count: ``[]`` or ``[1]``, float, accumulated in place; required with `sums`.
        valid: 1 where a token is real, 0 where it is padding, the leading shape of h; None is all real.
        backend: forces an implementation; None chooses.

    Returns:
        ``h * m``.

    Raises:
        ValueError: shapes disagree, or the backend does not exist.
    """
    op, D = "gate", h.shape[-1]
    require(op, {"mask": (mask, (D,)), "sums": (sums, (2, D)), "valid": (valid, tuple(h.shape[:-1]))})
    if (sums is None) != (count is None):
        raise ValueError("gate: sums and count go together; give both or neither")
    collect = sums is not None and torch.is_grad_enabled() and h.requires_grad
    arguments = (
        h.reshape(math.prod(h.shape[:-1]), D),
        mask,
        sums if collect else None,
        count if collect else None,
        valid.reshape(-1) if collect and valid is not None else None,
    )
    kernels = by_kernels(op, h, backend)
    y = _gate(*arguments, backend) if kernels else _eager_gate(*arguments)
    return y.view(h.shape)


def column_sums(x: Tensor, valid: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """``sum over tokens of |x|``. It is a statistic: through the kernels no gradient flows.

    Args:
        x: ``[..., D]``.
        valid: 1 where a token is real, 0 where it is padding, the leading shape of x; None is all real.
        backend: forces an implementation; None chooses.

    Returns:
        ``[D]``, at least float32.

    Raises:
        ValueError: shapes disagree, or the backend does not exist.
    """
    require("column_sums", {"valid": (valid, tuple(x.shape[:-1]))})
    x_TD = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    valid_T = None if valid is None else valid.reshape(-1)
    if by_kernels("column_sums", x, backend):
        return _column_sums(x_TD.detach(), valid_T, backend)
    return eager.column_sums(x_TD, valid_T)


@torch.library.custom_op("apt_kernels::column_sums", mutates_args=())
def _column_sums(x_TD: Tensor, valid_T: Tensor | None, backend: str | None) -> Tensor:
    name = selection.choose("column_sums", x_TD, backend, tuple(x_TD.shape))
    selection.count("column_sums", name)
    if name == "torch":
        return eager.column_sums(x_TD, valid_T)
    from apt_kernels import statistics

    sums_D = statistics.gate_pass(x_TD, None, valid_T, True)[1]
    assert sums_D is not None
    return sums_D


@_column_sums.register_fake
def _(x_TD: Tensor, valid_T: Tensor | None, backend: str | None) -> Tensor:
    return x_TD.new_empty(x_TD.shape[1], dtype=torch.float32)


@torch.library.custom_op("apt_kernels::gate_pass", mutates_args=())
def _gate_pass(
    x_TD: Tensor, mask: Tensor | None, valid_T: Tensor | None, collect: bool, backend: str | None
) -> tuple[Tensor, Tensor]:
    """``x * m`` and ``sum_t valid_t |x_t|`` in one read; empty where there is no mask, or nothing to collect."""
    name = selection.choose("gate", x_TD, backend, tuple(x_TD.shape))
    selection.count("gate", name)
    y_TD: Tensor | None
    sums_D: Tensor | None
    if name == "torch":
        y_TD = None if mask is None else x_TD * mask.to(x_TD.dtype)
        sums_D = eager.column_sums(x_TD, valid_T) if collect else None
    else:
        from apt_kernels import statistics

        y_TD, sums_D = statistics.gate_pass(x_TD, mask, valid_T, collect)
    return (
        x_TD.new_empty(0) if y_TD is None else y_TD,
        x_TD.new_empty(0, dtype=torch.float32) if sums_D is None else sums_D,
    )


@_gate_pass.register_fake
def _(
    x_TD: Tensor, mask: Tensor | None, valid_T: Tensor | None, collect: bool, backend: str | None
) -> tuple[Tensor, Tensor]:
    y_TD = x_TD.new_empty(0) if mask is None else x_TD.new_empty(x_TD.shape)
    return y_TD, x_TD.new_empty(x_TD.shape[1] if collect else 0, dtype=torch.float32)


class _Gate(torch.autograd.Function):
    """`eager.Gate` with one pass of the registered op each way. An open gate hands on what it gets, as there."""

    @staticmethod
    def forward(
        ctx: Any,
        h_TD: Tensor,
        mask: Tensor | None,
        sums_2D: Tensor | None,
        count: Tensor | None,
        valid_T: Tensor | None,
        backend: str | None,
    ) -> Tensor:
        ctx.save_for_backward(mask, valid_T)
        ctx.sums_2D, ctx.count, ctx.backend = sums_2D, count, backend
        y_TD = h_TD
        if mask is not None or sums_2D is not None:
            y_TD, ctx.abs_D = _gate_pass(h_TD, mask, valid_T, sums_2D is not None, backend)
        return h_TD.view_as(h_TD) if mask is None else y_TD

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        mask, valid_T = ctx.saved_tensors
        dy_TD = grads[0]
        if mask is None and ctx.sums_2D is None:
            return dy_TD, None, None, None, None, None
        dh_TD, abs_D = _gate_pass(dy_TD, mask, valid_T, ctx.sums_2D is not None, ctx.backend)
        if ctx.sums_2D is not None:
            eager.collect(ctx.sums_2D, ctx.count, ctx.abs_D, abs_D, dy_TD.shape[0], valid_T)
        return (dy_TD if mask is None else dh_TD), None, None, None, None, None


_gate: Callable[..., Tensor] = _Gate.apply  # torch leaves it untyped


def weight_kurtosis(
    weight: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    scale: float = 1.0,
    group: int = 1,
    column_scale: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Excess kurtosis of the effective weight per block of columns and per row.

    Of ``O = (W + s B A) diag(c)`` (APT, arXiv 2401.12200, eq. 5), c being the mean input over tokens: per neuron with
    ``group=1``, where c cancels; per head over all its columns with ``group=head size``; per hidden dimension a row.
    It is ``m4 / m2^2 - 3`` with the moments of the population, as scipy's, and -3 where all entries are equal or
    there is none.

    Args:
        weight: ``[O, I]`` of the projection that reads the units.
        a: ``[R, I]``, or None without an adapter.
        b: ``[O, R]``, likewise.
        scale: unitless, the constant s.
        group: columns a unit has; divides I.
        column_scale: ``[I]``, the vector c; None is all ones.
        backend: forces an implementation; None chooses.

    Returns:
        ``[I / group]`` and ``[O]`` in at least float32. No gradient flows.

    Raises:
        ValueError: shapes disagree, group does not divide I, or the backend does not exist.
    """
    op, (O, I) = "weight_kurtosis", weight.shape
    if (a is None) != (b is None):
        raise ValueError(f"{op}: a and b go together; give both or neither")
    R = 0 if a is None else a.shape[0]
    require(op, {"a": (a, (R, I)), "b": (b, (O, R)), "column_scale": (column_scale, (I,))})
    if group < 1 or I % group:
        raise ValueError(f"{op}: group must divide the {I} columns of weight, got {group}")
    with torch.no_grad():
        compute = _weight_kurtosis if by_kernels(op, weight, backend) else _eager_kurtosis
        return compute(weight, a, b, scale, group, column_scale, backend)


def _eager_kurtosis(*arguments: Any) -> tuple[Tensor, Tensor]:
    return eager.weight_kurtosis(*arguments[:-1])


@torch.library.custom_op("apt_kernels::weight_kurtosis", mutates_args=())
def _weight_kurtosis(
    weight: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    scale: float,
    group: int,
    column_scale: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    name = selection.choose("weight_kurtosis", weight, backend, tuple(weight.shape))
    selection.count("weight_kurtosis", name)
    if name == "torch":
        return eager.weight_kurtosis(weight, a, b, scale, group, column_scale)
    from apt_kernels import kurtosis

    return kurtosis.weight_kurtosis(weight, a, b, scale, group, column_scale)


@_weight_kurtosis.register_fake
def _(weight: Tensor, a: Tensor | None, b: Tensor | None, scale: float, group: int, *_: Any) -> tuple[Tensor, Tensor]:
    O, I = weight.shape
    return weight.new_empty(I // group, dtype=torch.float32), weight.new_empty(O, dtype=torch.float32)
