"""The activation of a feed-forward block with its mask. Dimension key: T tokens, D features."""

import torch
from torch import Tensor

from apt_kernels.autocast import outside_autocast
from apt_kernels.eager.statistics import column_sums

Grad = Tensor | None


def _activate(g_TD: Tensor, kind: str) -> Tensor:
    if kind == "silu":
        return torch.nn.functional.silu(g_TD)
    return torch.nn.functional.gelu(g_TD, approximate="tanh" if kind == "gelu_tanh" else "none")


@outside_autocast
def activation_forward(
    g_TD: Tensor, u_TD: Tensor | None, mask: Tensor | None, valid_T: Tensor | None, kind: str, collect: bool
) -> tuple[Tensor, Tensor | None]:
    """``h * m`` with ``h = act(g) * u``, and the column sums of h (None unless asked)."""
    h_TD = _activate(g_TD, kind)
    h_TD = h_TD if u_TD is None else h_TD * u_TD
    y_TD = h_TD if mask is None else h_TD * mask.to(h_TD.dtype)
    return y_TD, column_sums(h_TD, valid_T) if collect else None


@outside_autocast
def activation_backward(
    dy_TD: Tensor,
    g_TD: Tensor,
    u_TD: Tensor | None,
    mask: Tensor | None,
    valid_T: Tensor | None,
    kind: str,
    collect: bool,
    needs: tuple[bool, bool],
) -> tuple[Grad, Grad, Tensor | None]:
    """Gradients of g and u (None where not needed), and the column sums of dy (None unless asked)."""
    dh_TD = dy_TD if mask is None else dy_TD * mask.to(dy_TD.dtype)
    dg_TD = None
    if needs[0]:
        along = dh_TD if u_TD is None else dh_TD * u_TD
        if kind == "silu":
            dg_TD = torch.ops.aten.silu_backward(along, g_TD)
        else:
            approximate = "tanh" if kind == "gelu_tanh" else "none"
            dg_TD = torch.ops.aten.gelu_backward(along, g_TD, approximate=approximate)
    du_TD = dh_TD * _activate(g_TD, kind) if needs[1] else None
    return dg_TD, du_TD, column_sums(dy_TD, valid_T) if collect else None
