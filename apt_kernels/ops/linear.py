"""The public op of the adapted linear layer: checks and the choice of implementation; the arithmetic lies elsewhere."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from apt_kernels import eager
from apt_kernels.selection import by_kernels, require

_eager: Callable[..., Tensor] = eager.MaskedLoraLinear.apply  # torch leaves it untyped


def masked_lora_linear(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    scale: float,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    mask_in: Tensor | None = None,
    mask_out: Tensor | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """The adapted frozen linear layer with masks on both sides.

    Computes ``m_out * (W xm + b + s * B diag(g) A xm)`` with ``xm = m_in * x`` (APT, arXiv 2401.12200, eq. 2).
    Gradients flow to x, a, b and gate; weight, bias and masks are frozen.

    Args:
        x: input, ``[..., I]``; under autocast it is cast to the autocast dtype.
        weight: frozen, ``[O, I]``, the dtype of x; any strides (a view of a larger weight is fine).
        a: ``[R, I]``, cast to the dtype of x; its gradient has its own dtype.
        b: ``[O, R]``, likewise.
        scale: unitless, the constant s; not a function of R.
        bias: frozen, ``[O]``.
        gate: ``[R]``, or ``[..., R]`` with the leading shape of x; differentiable.
        mask_in: ``[I]``, 1 kept, 0 pruned, between while it decays. None where the producer of x applied it.
        mask_out: ``[O]``, likewise.
        dropout: probability in [0, 1), acts on the rank-R product of the low-rank path.
        seed: of the dropout; required when dropout > 0, so that a recomputed forward drops the same entries.
        backend: forces an implementation; None chooses.

    Returns:
        ``[..., O]`` in the dtype of x.

    Raises:
        ValueError: shapes or dtypes disagree, weight requires a gradient, or the backend does not exist.
    """
    op = "masked_lora_linear"
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    (O, I), R, lead = weight.shape, a.shape[0], x.shape[:-1]
    require(op, {"x": (x, (*lead, I)), "a": (a, (R, I)), "b": (b, (O, R)), "bias": (bias, (O,))})
    require(op, {"mask_in": (mask_in, (I,)), "mask_out": (mask_out, (O,))})
    if gate is not None and gate.dim() != 1:
        require(op, {"gate": (gate, (*lead, R))})
        gate = gate.reshape(math.prod(lead), R)
    elif gate is not None:
        require(op, {"gate": (gate, (R,))})
    if weight.dtype != x.dtype:
        raise ValueError(f"{op}: x is {x.dtype} but weight is {weight.dtype}; cast one, or run under torch.autocast")
    if torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        raise ValueError(f"{op}: weight and bias are frozen and get no gradient; call requires_grad_(False) on them")
    if not 0.0 <= dropout < 1.0 or (dropout > 0.0 and seed is None):
        raise ValueError(f"{op}: dropout must be in [0, 1) and needs a seed, got dropout={dropout}, seed={seed}")
    by_kernels(op, x, backend)
    x_TI = x.reshape(math.prod(lead), I)  # not -1, which nothing determines where I is 0
    y = _eager(x_TI, weight, a, b, bias, gate, mask_in, mask_out, scale, dropout, seed or 0)
    return y.view(*lead, O)
