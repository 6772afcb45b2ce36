"""Plain PyTorch statements of every op: slow, obvious, differentiated by autograd, and the oracle of all tests.

Dimension key: T tokens (any leading shape), I in, O out, R rank, D features.
"""

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
    n = mask.sum()
    if kind == "layer":
        x_TD = x_TD - (mask * x_TD).sum(-1, keepdim=True) / n
    variance = (mask * x_TD.square()).sum(-1, keepdim=True) / n
    y_TD = x_TD * torch.rsqrt(variance + eps) * weight
    return y_TD if bias is None else y_TD + bias
