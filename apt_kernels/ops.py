"""Public ops: checks, choice of implementation, counters. The arithmetic lies in `eager.py` and the kernel files."""

import math
import os
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from apt_kernels import eager

IMPLEMENTATIONS = ("torch",)  # the kernel files add theirs here

# torch leaves `Function.apply` untyped; the result's type is written once, here.
_eager_lora_linear: Callable[..., Tensor] = eager.MaskedLoraLinear.apply
_eager_gate: Callable[..., Tensor] = eager.Gate.apply
_eager_norm: Callable[..., Tensor] = eager.MaskedNorm.apply

_calls: dict[str, dict[str, int]] = {}


def calls() -> dict[str, dict[str, int]]:
    """How often each implementation of each op ran since `reset_calls`: ``{op: {implementation: count}}``."""
    return {op: dict(counts) for op, counts in _calls.items()}


def reset_calls() -> None:
    """Set every counter of `calls` back to nothing."""
    _calls.clear()


def _implementation(op: str, backend: str | None) -> str:
    """The implementation to run, counted. A forced one (argument or APT_BACKEND) never falls back to another."""
    name = backend or os.environ.get("APT_BACKEND") or "torch"
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"{op}: backend {name!r} is not available; choose one of {list(IMPLEMENTATIONS)}")
    counts = _calls.setdefault(op, {})
    counts[name] = counts.get(name, 0) + 1
    return name


def _require(op: str, tensors: dict[str, tuple[Tensor | None, tuple[int, ...]]]) -> None:
    for name, (tensor, shape) in tensors.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{op}: {name} must be {list(shape)}, got {list(tensor.shape)}")


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
    _require(op, {"x": (x, (*lead, I)), "a": (a, (R, I)), "b": (b, (O, R)), "bias": (bias, (O,))})
    _require(op, {"mask_in": (mask_in, (I,)), "mask_out": (mask_out, (O,))})
    if gate is not None and gate.dim() != 1:
        _require(op, {"gate": (gate, (*lead, R))})
        gate = gate.reshape(math.prod(lead), R)
    elif gate is not None:
        _require(op, {"gate": (gate, (R,))})
    if weight.dtype != x.dtype:
        raise ValueError(f"{op}: x is {x.dtype} but weight is {weight.dtype}; cast one, or run under torch.autocast")
    if torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        raise ValueError(f"{op}: weight and bias are frozen and get no gradient; call requires_grad_(False) on them")
    if not 0.0 <= dropout < 1.0 or (dropout > 0.0 and seed is None):
        raise ValueError(f"{op}: dropout must be in [0, 1) and needs a seed, got dropout={dropout}, seed={seed}")
    _implementation(op, backend)
    x_TI = x.reshape(math.prod(lead), I)  # not -1, which nothing determines where I is 0
    y = _eager_lora_linear(x_TI, weight, a, b, bias, gate, mask_in, mask_out, scale, dropout, seed or 0)
    return y.view(*lead, O)


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

    Returns ``h * m``. Where `sums` is given, the backward pass adds ``sum_t |h|`` to ``sums[0]``, ``sum_t |dL/dy|``
    (the upstream gradient at the gate's output) to ``sums[1]`` and the number of tokens to `count`, padding left out.

    Args:
        h: ``[..., D]``.
        mask: ``[D]``, 1 kept, 0 pruned, between while it decays; None is all ones.
        sums: ``[2, D]``, at least float32, accumulated in place.
        count: ``[]`` or ``[1]``, float, accumulated in place; required with `sums`.
        valid: 1 where a token is real, 0 where it is padding, the leading shape of h; None is all real.
        backend: forces an implementation; None chooses.

    Raises:
        ValueError: shapes disagree.
    """
    D = h.shape[-1]
    _require("gate", {"mask": (mask, (D,)), "sums": (sums, (2, D)), "valid": (valid, tuple(h.shape[:-1]))})
    if (sums is None) != (count is None):
        raise ValueError("gate: sums and count go together; give both or neither")
    _implementation("gate", backend)
    collect = sums is not None and torch.is_grad_enabled() and h.requires_grad
    y = _eager_gate(
        h.reshape(math.prod(h.shape[:-1]), D),
        mask,
        sums if collect else None,
        count if collect else None,
        valid.reshape(-1) if collect and valid is not None else None,
    )
    return y.view(h.shape)


def column_sums(x: Tensor, valid: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """``sum over tokens of |x|``: ``[D]`` in at least float32. `valid` has the leading shape of x; None is all real."""
    _require("column_sums", {"valid": (valid, tuple(x.shape[:-1]))})
    _implementation("column_sums", backend)
    x_TD = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return eager.column_sums(x_TD, None if valid is None else valid.reshape(-1))


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
    the dense norm at m = 1, the norm of the kept dimensions at m in {0, 1}, and is continuous between.

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
        ValueError: shapes disagree or the kind is unknown.
    """
    D = x.shape[-1]
    _require("masked_norm", {"weight": (weight, (D,)), "bias": (bias, (D,)), "mask": (mask, (D,))})
    if kind not in ("layer", "rms"):
        raise ValueError(f"masked_norm: kind must be 'layer' or 'rms', got {kind!r}")
    _implementation("masked_norm", backend)
    y = _eager_norm(x.reshape(math.prod(x.shape[:-1]), D), weight, bias, mask, eps, kind == "layer")
    return y.view(x.shape)
