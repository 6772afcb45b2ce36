"""Plain PyTorch statements of every op: slow, obvious, differentiated by autograd, and the oracle of all tests.

Dimension key: T tokens (any leading shape), I in, O out, R rank, D features.
"""

import math

import torch
from torch import Tensor


def masked_lora_linear(
    x_TI: Tensor,
    weight_OI: Tensor,
    a_RI: Tensor,
    b_OR: Tensor,
    *,
    scale: float,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    mask_in: Tensor | None = None,
    mask_out: Tensor | None = None,
) -> Tensor:
    """``m_out * (W xm + b + s * B diag(g) A xm)`` with ``xm = m_in * x``   (APT, arXiv 2401.12200, eq. 2)."""
    x_TI = x_TI if mask_in is None else x_TI * mask_in
    z_TR = x_TI @ a_RI.T
    z_TR = z_TR if gate is None else z_TR * gate
    y_TO = x_TI @ weight_OI.T + scale * (z_TR @ b_OR.T)
    y_TO = y_TO if bias is None else y_TO + bias
    return y_TO if mask_out is None else y_TO * mask_out


def column_sums(x_TD: Tensor, valid_T: Tensor | None = None) -> Tensor:
    """Sum over tokens of ``|x|``, padding left out: ``[D]``."""
    x_TD = x_TD.abs().flatten(0, -2)
    return x_TD.sum(0) if valid_T is None else (x_TD * valid_T.flatten().to(x_TD.dtype)[:, None]).sum(0)


def masked_norm(
    x_TD: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, *, eps: float, kind: str
) -> Tensor:
    """LayerNorm or RMSNorm whose statistics weigh each dimension by its mask: ``n = sum m``, ``mean = sum m x / n``."""
    mask = torch.ones_like(weight) if mask is None else mask
    share = mask / mask.sum().clamp(min=torch.finfo(mask.dtype).tiny)  # all 0 where every mask is
    if kind == "layer":
        x_TD = x_TD - (share * x_TD).sum(-1, keepdim=True)
    variance = (share * x_TD.square()).sum(-1, keepdim=True)
    y_TD = x_TD * torch.rsqrt(variance + eps) * weight
    return y_TD if bias is None else y_TD + bias


def gated_activation(g_TD: Tensor, u_TD: Tensor | None = None, mask: Tensor | None = None, *, kind: str) -> Tensor:
    """``act(g) * u * m``; act is x times its sigmoid (silu), its normal distribution (gelu), or that by tanh."""
    if kind == "silu":
        h_TD = g_TD * torch.sigmoid(g_TD)
    elif kind == "gelu":
        h_TD = g_TD * (1 + torch.erf(g_TD / math.sqrt(2))) / 2
    else:
        h_TD = g_TD * (1 + torch.tanh(math.sqrt(2 / math.pi) * (g_TD + 0.044715 * g_TD**3))) / 2
    h_TD = h_TD if u_TD is None else h_TD * u_TD
    return h_TD if mask is None else h_TD * mask


def kurtosis(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Excess kurtosis ``m4 / m2^2 - 3`` with moments of the population over `dims`; -3 where all entries are equal."""
    d = x - x.mean(dims, keepdim=True)
    m2, m4 = d.square().mean(dims), d.pow(4).mean(dims)
    return torch.where(m2 > 0, m4 / m2.square(), 0.0) - 3.0


def weight_kurtosis(
    weight_OI: Tensor,
    a_RI: Tensor | None = None,
    b_OR: Tensor | None = None,
    *,
    scale: float = 1.0,
    group: int = 1,
    column_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Kurtosis of ``(W + s B A) diag(c)`` over each block of `group` columns and over each row."""
    o_OI = weight_OI if a_RI is None or b_OR is None else weight_OI + scale * (b_OR @ a_RI)
    o_OI = o_OI if column_scale is None else o_OI * column_scale
    return kurtosis(o_OI.unflatten(1, (o_OI.shape[1] // group, group)), (0, 2)), kurtosis(o_OI, (1,))
