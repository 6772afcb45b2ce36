"""The public op of norms that know masks: checks, the choice of implementation, registered ops with autograd."""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from apt_kernels import eager
from apt_kernels.ops.registered import computed_by, or_empty
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
    the dense norm at m = 1, the norm of the kept dimensions at m in {0, 1}, and is continuous between. Where every m is
    0, mean and variance are 0.

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
        ValueError: shapes disagree, the kind is unknown, or the backend does not exist or cannot hold a row.
    """
    D = x.shape[-1]
    require("masked_norm", {"weight": (weight, (D,)), "bias": (bias, (D,)), "mask": (mask, (D,))})
    if kind not in ("layer", "rms"):
        raise ValueError(f"masked_norm: kind must be 'layer' or 'rms', got {kind!r}")
    x_TD, centred = x.reshape(math.prod(x.shape[:-1]), D), kind == "layer"
    if by_kernels("masked_norm", x, backend):
        y = _norm_forward(x_TD, weight, bias, mask, eps, centred, backend)[0]
    else:
        y = _eager_norm(x_TD, weight, bias, mask, eps, centred)
    return y.view(x.shape)


@torch.library.custom_op("apt_kernels::masked_norm_forward", mutates_args=())
def _norm_forward(
    x_TD: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    eps: float,
    centred: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and of each row the mean (0 for RMSNorm) and 1 / deviation, in float32."""
    run: Callable[..., tuple[Tensor, Tensor, Tensor]] = computed_by("masked_norm", x_TD, backend).norm_forward
    return run(x_TD, weight, bias, mask, eps, centred)


@_norm_forward.register_fake
def _(x_TD: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    mean_T, rstd_T = (x_TD.new_empty(x_TD.shape[0], dtype=torch.float32) for _ in range(2))
    return x_TD.new_empty(x_TD.shape), mean_T, rstd_T


@torch.library.custom_op("apt_kernels::masked_norm_backward", mutates_args=())
def _norm_backward(
    dy_TD: Tensor,
    x_TD: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    mean_T: Tensor,
    rstd_T: Tensor,
    centred: bool,
    needs_x: bool,
    needs_weight: bool,
    needs_bias: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x in its dtype, of weight and bias in float32; empty where not needed."""
    run, needs = computed_by("masked_norm", x_TD, backend), (needs_x, needs_weight, needs_bias)
    dx_TD, *grads = run.norm_backward(dy_TD, x_TD, weight, mask, mean_T, rstd_T, centred, needs)
    grad_weight, grad_bias = (or_empty(grad, x_TD, torch.float32) for grad in grads)
    return or_empty(dx_TD, x_TD), grad_weight, grad_bias


@_norm_backward.register_fake
def _(dy_TD: Tensor, x_TD: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    needs_x, needs_weight, needs_bias = rest[-4:-1]
    D = x_TD.shape[1]
    return (
        x_TD.new_empty(x_TD.shape if needs_x else 0),
        x_TD.new_empty(D if needs_weight else 0, dtype=torch.float32),
        x_TD.new_empty(D if needs_bias else 0, dtype=torch.float32),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_TD, weight, bias, mask, _, ctx.centred, ctx.backend = inputs
    ctx.save_for_backward(x_TD, weight, bias, mask, *output[1:])


def _differentiate(ctx: Any, dy_TD: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    x_TD, weight, bias, mask, mean_T, rstd_T = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    found = _norm_backward(dy_TD, x_TD, weight, mask, mean_T, rstd_T, ctx.centred, *needs, ctx.backend)
    of_learnt = (
        grad.to(learnt.dtype) if need else None
        for grad, learnt, need in zip(found, (x_TD, weight, bias), needs, strict=True)
    )
    return *of_learnt, None, None, None, None  # mask, eps, centred, backend


_norm_forward.register_autograd(_differentiate, setup_context=_save)
