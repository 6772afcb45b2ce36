"""Column sums, the gate that collects them, and the kurtosis of weights.

Dimension key: T tokens, I in, O out, R rank, D features.
"""

from typing import Any

import torch
from torch import Tensor

Grad = Tensor | None


def column_sums(x_TD: Tensor, valid_T: Tensor | None) -> Tensor:
    """``sum_t valid_t |x_t|`` in at least float32: ``[D]``. One pass to take the magnitude, one to reduce."""
    dtype = torch.promote_types(x_TD.dtype, torch.float32)
    if valid_T is None:
        sums_D: Tensor = torch.linalg.vector_norm(x_TD, ord=1, dim=0, dtype=dtype)
        return sums_D
    return valid_T.to(dtype) @ x_TD.abs().to(dtype)


def collect(
    sums_2D: Tensor, count: Tensor, abs_D: Tensor, grad_abs_D: Tensor, num_rows: int, valid_T: Tensor | None
) -> None:
    """What a backward pass adds, in place, to the statistics of a gate."""
    sums_2D[0] += abs_D
    sums_2D[1] += grad_abs_D
    count += num_rows if valid_T is None else valid_T.sum()


class Gate(torch.autograd.Function):
    """``h * m``; backward adds the column sums of ``|h|`` and of the upstream ``|dL/dy|``, and the token count."""

    @staticmethod
    def forward(
        ctx: Any,
        h_TD: Tensor,
        mask: Tensor | None,
        sums_2D: Tensor | None,
        count: Tensor | None,
        valid_T: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(mask, valid_T)
        ctx.sums_2D, ctx.count = sums_2D, count
        # Added to `sums` in backward only, so a forward that is recomputed or thrown away counts for nothing.
        ctx.abs_D = column_sums(h_TD, valid_T) if sums_2D is not None else None
        return h_TD.view_as(h_TD) if mask is None else h_TD * mask.to(h_TD.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Grad, ...]:
        mask, valid_T = ctx.saved_tensors
        dy_TD = grads[0]
        if ctx.sums_2D is not None:
            collect(ctx.sums_2D, ctx.count, ctx.abs_D, column_sums(dy_TD, valid_T), dy_TD.shape[0], valid_T)
        return (dy_TD if mask is None else dy_TD * mask.to(dy_TD.dtype)), None, None, None, None


def _kurtosis(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    d = x - x.mean(dims, keepdim=True)
    squares = d.square_()
    m2, m4 = squares.mean(dims), squares.square().mean(dims)
    return torch.where(m2 > 0, m4 / m2.square(), 0.0) - 3.0


def weight_kurtosis(
    weight_OI: Tensor, a_RI: Tensor | None, b_OR: Tensor | None, scale: float, group: int, column_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Kurtosis of each block of `group` columns and of each row of ``(W + s B A) diag(c)``, in at least float32."""
    wide = torch.promote_types(weight_OI.dtype, torch.float32)
    o_OI = weight_OI.to(wide)
    if a_RI is not None and b_OR is not None:
        o_OI = torch.addmm(o_OI, b_OR.to(wide), a_RI.to(wide), alpha=scale)
    if column_scale is not None:
        o_OI = o_OI * column_scale.to(wide)
    return _kurtosis(o_OI.unflatten(1, (o_OI.shape[1] // group, group)), (0, 2)), _kurtosis(o_OI, (1,))
