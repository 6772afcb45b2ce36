"""Column sums, alone and with the gate's product, and the kurtosis of weights.

Dimension key: T tokens, I in, O out, R rank, D features.
"""

import torch
from torch import Tensor

from apt_kernels.autocast import outside_autocast


@outside_autocast
def column_sums(x_TD: Tensor, valid_T: Tensor | None) -> Tensor:
    """``sum_t valid_t |x_t|`` in at least float32: ``[D]``. One pass to take the magnitude, one to reduce."""
    dtype = torch.promote_types(x_TD.dtype, torch.float32)
    if valid_T is None:
        sums_D: Tensor = torch.linalg.vector_norm(x_TD, ord=1, dim=0, dtype=dtype)
        return sums_D
    return valid_T.to(dtype) @ x_TD.abs().to(dtype)


@outside_autocast
def gate_pass(
    x_TD: Tensor, mask: Tensor | None, valid_T: Tensor | None, collect: bool
) -> tuple[Tensor | None, Tensor | None]:
    """``x * m`` (None without a mask) and the column sums (None unless asked)."""
    y_TD = None if mask is None else x_TD * mask.to(x_TD.dtype)
    return y_TD, column_sums(x_TD, valid_T) if collect else None


def _kurtosis(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    d = x - x.mean(dims, keepdim=True)
    squares = d.square_()
    m2, m4 = squares.mean(dims), squares.square().mean(dims)
    return torch.where(m2 > 0, m4 / m2.square(), 0.0) - 3.0


@outside_autocast
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
