"""The public ops that collect what salience needs: checks, the choice of implementation, registered ops, autograd."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from apt_kernels import eager
from apt_kernels.ops.registered import computed_by, or_empty
from apt_kernels.selection import by_kernels, require


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
    statistics = collected(op, sums, count, valid, h.requires_grad)
    h_TD = h.reshape(math.prod(h.shape[:-1]), D)
    return _gate(h_TD, mask, *statistics, by_kernels(op, h, backend), backend).view(h.shape)


def collected(
    op: str, sums: Tensor | None, count: Tensor | None, valid: Tensor | None, learns: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Sums and count that a backward pass adds to, and which tokens are real: nothing where none will come.

    Raises:
        ValueError: one of sums and count is missing.
    """
    if (sums is None) != (count is None):
        raise ValueError(f"{op}: sums and count go together; give both or neither")
    if sums is None or not (torch.is_grad_enabled() and learns):
        return None, None, None
    return sums, count, None if valid is None else valid.reshape(-1)


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
    sums_D: Tensor
    _, sums_D = computed_by("column_sums", x_TD, backend).gate_pass(x_TD, None, valid_T, True)
    return sums_D


@_column_sums.register_fake
def _(x_TD: Tensor, valid_T: Tensor | None, backend: str | None) -> Tensor:
    return x_TD.new_empty(x_TD.shape[1], dtype=torch.float32)


@torch.library.custom_op("apt_kernels::gate_pass", mutates_args=())
def _gate_pass(
    x_TD: Tensor, mask: Tensor | None, valid_T: Tensor | None, collect: bool, backend: str | None
) -> tuple[Tensor, Tensor]:
    """``x * m`` and ``sum_t valid_t |x_t|`` in one read; empty where there is no mask, or nothing to collect."""
    y_TD, sums_D = computed_by("gate", x_TD, backend).gate_pass(x_TD, mask, valid_T, collect)
    return or_empty(y_TD, x_TD), or_empty(sums_D, x_TD, torch.float32)


@_gate_pass.register_fake
def _(
    x_TD: Tensor, mask: Tensor | None, valid_T: Tensor | None, collect: bool, backend: str | None
) -> tuple[Tensor, Tensor]:
    y_TD = x_TD.new_empty(0) if mask is None else x_TD.new_empty(x_TD.shape)
    return y_TD, x_TD.new_empty(x_TD.shape[1] if collect else 0, dtype=torch.float32)


def add_statistics(ctx: Any, grad_abs_D: Tensor, num_rows: int, valid_T: Tensor | None) -> None:
    """Add, in place, what forward kept and backward found. In backward, so that a recomputed forward counts once."""
    # By add_ on a view: `sums[0] += v` copies the row onto itself as well.
    ctx.sums_2D[0].add_(ctx.abs_D)
    ctx.sums_2D[1].add_(grad_abs_D)
    ctx.count.add_(num_rows if valid_T is None else valid_T.sum(dtype=ctx.count.dtype))


class _Gate(torch.autograd.Function):
    """``h * m``; backward adds the column sums of ``|h|`` and of the upstream ``|dL/dy|``, and the token count.

    An open gate hands on what it gets.
    """

    @staticmethod
    def forward(
        ctx: Any,
        h_TD: Tensor,
        mask: Tensor | None,
        sums_2D: Tensor | None,
        count: Tensor | None,
        valid_T: Tensor | None,
        kernels: bool,
        backend: str | None,
    ) -> Tensor:
        ctx.save_for_backward(mask)
        # Not saved: a checkpoint would replace it by that of the forward it runs anew, perhaps in another pass.
        ctx.valid_T = valid_T
        ctx.sums_2D, ctx.count, ctx.kernels, ctx.backend = sums_2D, count, kernels, backend
        y_TD, ctx.abs_D = _one_pass(ctx, h_TD, mask, valid_T)
        return h_TD.view_as(h_TD) if mask is None else y_TD

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        valid_T = ctx.valid_T
        dh_TD, abs_D = _one_pass(ctx, grads[0], mask, valid_T)
        if ctx.sums_2D is not None:
            add_statistics(ctx, abs_D, grads[0].shape[0], valid_T)
        return (grads[0] if mask is None else dh_TD), *[None] * 6


def _one_pass(ctx: Any, x_TD: Tensor, mask: Tensor | None, valid_T: Tensor | None) -> tuple[Any, Any]:
    """By the registered op where there is anything to do for it; eager's can be traced."""
    collect = ctx.sums_2D is not None
    if ctx.kernels and (mask is not None or collect):
        return _gate_pass(x_TD, mask, valid_T, collect, ctx.backend)
    return eager.gate_pass(x_TD, mask, valid_T, collect)


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
    arguments = (weight, a, b, scale, group, column_scale)
    with torch.no_grad():
        if by_kernels(op, weight, backend):
            return _weight_kurtosis(*arguments, backend)
        return eager.weight_kurtosis(*arguments)


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
    compute: Callable[..., tuple[Tensor, Tensor]] = computed_by("weight_kurtosis", weight, backend).weight_kurtosis
    return compute(weight, a, b, scale, group, column_scale)


@_weight_kurtosis.register_fake
def _(weight: Tensor, a: Tensor | None, b: Tensor | None, scale: float, group: int, *_: Any) -> tuple[Tensor, Tensor]:
    O, I = weight.shape
    return weight.new_empty(I // group, dtype=torch.float32), weight.new_empty(O, dtype=torch.float32)
