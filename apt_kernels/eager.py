"""Eager PyTorch implementations with hand-written backward: the path wherever no kernel is proven faster.

Each does the fewest passes over the large tensors: the masked linear saves x and the rank-R product only, adds the
low-rank part into the frozen product in place, and computes just the gradients that are asked for.

Dimension key: T tokens, I in, O out, R rank, D features.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Grad = Tensor | None


def _dropout_scale(z_TR: Tensor, p: float, seed: int) -> Tensor:
    """0 where dropped, 1 / (1 - p) elsewhere: drawn from the seed, so backward draws it again and saves nothing."""
    generator = torch.Generator(z_TR.device).manual_seed(seed)
    keep_TR = torch.rand(z_TR.shape, generator=generator, device=z_TR.device) >= p
    return keep_TR.to(z_TR.dtype) / (1.0 - p)


def _gated(z_TR: Tensor, gate: Tensor | None, dropout: float, seed: int) -> Tensor:
    if dropout > 0.0:
        z_TR = z_TR * _dropout_scale(z_TR, dropout, seed)
    return z_TR if gate is None else z_TR * gate.to(z_TR.dtype)


def lora_linear(
    x_TI: Tensor,
    weight_OI: Tensor,
    a_RI: Tensor,
    b_OR: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    mask_in: Tensor | None,
    mask_out: Tensor | None,
    scale: float,
    dropout: float,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """``m_out * (W xm + b + s B (g * drop(z)))`` and ``z = A xm`` with ``xm = m_in * x``."""
    dtype = x_TI.dtype
    xm_TI = x_TI if mask_in is None else x_TI * mask_in.to(dtype)
    z_TR = xm_TI @ a_RI.to(dtype).T
    y_TO = xm_TI @ weight_OI.T if bias is None else torch.addmm(bias.to(dtype), xm_TI, weight_OI.T)
    y_TO.addmm_(_gated(z_TR, gate, dropout, seed), b_OR.to(dtype).T, alpha=scale)
    if mask_out is not None:
        y_TO.mul_(mask_out.to(dtype))
    return y_TO, z_TR


def lora_linear_backward(
    dy_TO: Tensor,
    x_TI: Tensor,
    z_TR: Tensor,
    weight_OI: Tensor,
    a_RI: Tensor,
    b_OR: Tensor,
    gate: Tensor | None,
    mask_in: Tensor | None,
    mask_out: Tensor | None,
    scale: float,
    dropout: float,
    seed: int,
    needs: Sequence[bool],
) -> tuple[Grad, Grad, Grad, Grad]:
    """Gradients of x, a, b and gate, each where `needs` asks for it."""
    needs_x, needs_a, needs_b, needs_gate = needs
    dtype = x_TI.dtype
    dy_TO = dy_TO if mask_out is None else dy_TO * mask_out.to(dtype)
    grad_x = grad_a = grad_b = grad_gate = None

    if needs_b:
        gated_TR = _gated(z_TR, gate, dropout, seed)
        # [R, T] @ [T, O] and a transpose: several times faster on CPU than [O, T] @ [T, R]
        grad_b = (gated_TR.T @ dy_TO).T.to(b_OR.dtype) * scale
    if needs_x or needs_a or needs_gate:
        dz_TR = (dy_TO @ b_OR.to(dtype)).mul_(scale)  # gradient of the gated product
        kept_TR = _dropout_scale(z_TR, dropout, seed) if dropout > 0.0 else None
        if needs_gate:
            assert gate is not None
            rows_TR = dz_TR * (z_TR if kept_TR is None else z_TR * kept_TR)
            grad_gate = (rows_TR.sum(0) if gate.dim() == 1 else rows_TR).to(gate.dtype)
        if gate is not None:
            dz_TR = dz_TR * gate.to(dtype)
        if kept_TR is not None:
            dz_TR = dz_TR * kept_TR
        if needs_a:
            grad_a = (dz_TR.T @ x_TI).to(a_RI.dtype)
            grad_a = grad_a if mask_in is None else grad_a.mul_(mask_in.to(a_RI.dtype))
        if needs_x:
            grad_x = dy_TO @ weight_OI
            grad_x.addmm_(dz_TR, a_RI.to(dtype))
            grad_x = grad_x if mask_in is None else grad_x.mul_(mask_in.to(dtype))
    return grad_x, grad_a, grad_b, grad_gate


class MaskedLoraLinear(torch.autograd.Function):
    """`lora_linear` for autograd: nothing is saved but x and the rank-R product."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        x_TI, weight_OI, a_RI, b_OR, _, gate, mask_in, mask_out, *ctx.settings = args
        y_TO, z_TR = lora_linear(*args)
        ctx.save_for_backward(x_TI, z_TR, weight_OI, a_RI, b_OR, gate, mask_in, mask_out)
        return y_TO

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Grad, ...]:
        x, _, a, b, _, gate, *_ = ctx.needs_input_grad
        saved = (grads[0], *ctx.saved_tensors, *ctx.settings)
        grad_x, grad_a, grad_b, grad_gate = lora_linear_backward(*saved, (x, a, b, gate))  # type: ignore[call-arg]
        return grad_x, None, grad_a, grad_b, None, grad_gate, None, None, None, None, None


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


def norm_share(weight: Tensor, mask: Tensor | None, wide: torch.dtype) -> Tensor:
    """What each dimension weighs in the statistics: ``m / sum m``, 0 where every mask is."""
    if mask is None:
        return torch.full_like(weight, 1.0 / max(weight.numel(), 1), dtype=wide)
    mask = mask.to(wide)
    return mask / mask.sum().clamp(min=torch.finfo(wide).tiny)


def _normalise(x_TD: Tensor, share: Tensor, eps: float, centred: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The normalised rows, and the mean and 1 / deviation of each, ``[T, 1]``."""
    x_TD = x_TD.to(share.dtype)
    mean_T = (x_TD @ share)[:, None] if centred else x_TD.new_zeros(x_TD.shape[0], 1)
    if centred:
        x_TD = x_TD - mean_T
    rstd_T = torch.rsqrt(x_TD.square() @ share + eps)[:, None]
    return x_TD * rstd_T, mean_T, rstd_T


def _affine(xhat_TD: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y_TD = xhat_TD * weight.to(xhat_TD.dtype)
    return y_TD if bias is None else y_TD + bias.to(xhat_TD.dtype)


def norm_forward(
    x_TD: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, eps: float, centred: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The norm, and the mean and 1 / deviation of each row, ``[T]``, in at least float32."""
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    xhat_TD, mean_T, rstd_T = _normalise(x_TD, norm_share(weight, mask, wide), eps, centred)
    return _affine(xhat_TD, weight, bias).to(x_TD.dtype), mean_T[:, 0], rstd_T[:, 0]


def norm_backward(
    dy_TD: Tensor,
    xhat_TD: Tensor,
    rstd_T: Tensor,
    weight: Tensor,
    share: Tensor,
    centred: bool,
    needs: tuple[bool, bool, bool],
) -> tuple[Grad, Grad, Grad]:
    """Gradients of x, weight and bias in the wide dtype of `dy_TD` and `xhat_TD`; None where not needed."""
    grad_x = None
    if needs[0]:
        g_TD = dy_TD * weight.to(dy_TD.dtype)
        along = xhat_TD * (g_TD * xhat_TD).sum(-1, keepdim=True)
        if centred:
            along = along + g_TD.sum(-1, keepdim=True)
        grad_x = rstd_T * (g_TD - share * along)
    return grad_x, (dy_TD * xhat_TD).sum(0) if needs[1] else None, dy_TD.sum(0) if needs[2] else None


class MaskedNorm(torch.autograd.Function):
    """LayerNorm (``centred``) or RMSNorm with mask-weighted statistics, sums in at least float32."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, eps: float, centred: bool
    ) -> Tensor:
        share = norm_share(weight, mask, torch.promote_types(x_TD.dtype, torch.float32))
        xhat_TD, _, rstd_T = _normalise(x_TD, share, eps, centred)
        ctx.save_for_backward(xhat_TD, rstd_T, weight, bias, share)
        ctx.centred = centred
        return _affine(xhat_TD, weight, bias).to(x_TD.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Grad, ...]:
        xhat_TD, rstd_T, weight, bias, share = ctx.saved_tensors
        needs, dy_TD = ctx.needs_input_grad[:3], grads[0].to(xhat_TD.dtype)
        grad_x, grad_weight, grad_bias = norm_backward(dy_TD, xhat_TD, rstd_T, weight, share, ctx.centred, needs)
        return (
            None if grad_x is None else grad_x.to(grads[0].dtype),
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
        )


def _activate(g_TD: Tensor, kind: str) -> Tensor:
    if kind == "silu":
        return torch.nn.functional.silu(g_TD)
    return torch.nn.functional.gelu(g_TD, approximate="tanh" if kind == "gelu_tanh" else "none")


def activation_forward(g_TD: Tensor, u_TD: Tensor | None, mask: Tensor | None, kind: str) -> tuple[Tensor, Tensor]:
    """``h = act(g) * u`` and ``h * m``; one tensor where there is no mask."""
    h_TD = _activate(g_TD, kind)
    h_TD = h_TD if u_TD is None else h_TD * u_TD
    return h_TD, h_TD if mask is None else h_TD * mask.to(h_TD.dtype)


def activation_backward(
    dy_TD: Tensor, g_TD: Tensor, u_TD: Tensor | None, mask: Tensor | None, kind: str, needs: tuple[bool, bool]
) -> tuple[Grad, Grad]:
    """Gradients of g and u; None where not needed."""
    dh_TD = dy_TD if mask is None else dy_TD * mask.to(dy_TD.dtype)
    dg_TD = None
    if needs[0]:
        along = dh_TD if u_TD is None else dh_TD * u_TD
        if kind == "silu":
            dg_TD = torch.ops.aten.silu_backward(along, g_TD)
        else:
            approximate = "tanh" if kind == "gelu_tanh" else "none"
            dg_TD = torch.ops.aten.gelu_backward(along, g_TD, approximate=approximate)
    return dg_TD, dh_TD * _activate(g_TD, kind) if needs[1] else None


class GatedActivation(torch.autograd.Function):
    """``act(g) * u * m`` with the statistics of `Gate`; saves g and u, and takes the activation again in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        g_TD: Tensor,
        u_TD: Tensor | None,
        mask: Tensor | None,
        kind: str,
        sums_2D: Tensor | None,
        count: Tensor | None,
        valid_T: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(g_TD, u_TD, mask, valid_T)
        ctx.kind, ctx.sums_2D, ctx.count = kind, sums_2D, count
        h_TD, y_TD = activation_forward(g_TD, u_TD, mask, kind)
        ctx.abs_D = column_sums(h_TD, valid_T) if sums_2D is not None else None
        return y_TD

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Grad, ...]:
        g_TD, u_TD, mask, valid_T = ctx.saved_tensors
        needs_g, needs_u, *_ = ctx.needs_input_grad
        if ctx.sums_2D is not None:
            sums_D = column_sums(grads[0], valid_T)
            collect(ctx.sums_2D, ctx.count, ctx.abs_D, sums_D, grads[0].shape[0], valid_T)
        dg_TD, du_TD = activation_backward(grads[0], g_TD, u_TD, mask, ctx.kind, (needs_g, needs_u))
        return dg_TD, du_TD, None, None, None, None, None


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
