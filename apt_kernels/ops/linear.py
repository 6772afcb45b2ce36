"""The public op of the adapted linear layer: checks and the choice of implementation; the arithmetic lies elsewhere."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from apt_kernels import eager
from apt_kernels._triton import capturing, rows_contiguous
from apt_kernels.autocast import cast_for_product
from apt_kernels.operands import LoraGrads, LoraNeeds, LoraOperands, save, saved
from apt_kernels.ops.registered import or_empty
from apt_kernels.selection import by_kernels, choose, count, require
from apt_kernels.tiles import padded_rank

OP = "masked_lora_linear"
INPUTS = ("x", *LoraOperands._fields, "backend")  # of the registered op
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
        x: input, ``[..., I]``; under autocast x and weight are cast to its dtype, but for float64.
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
        ValueError: shapes or dtypes disagree, weight requires a gradient, the backend does not exist, or dropout is
            captured into a CUDA graph.
    """
    x, weight = cast_for_product(x, weight)
    (O, I), R, lead = weight.shape, a.shape[0], x.shape[:-1]
    require(OP, {"x": (x, (*lead, I)), "a": (a, (R, I)), "b": (b, (O, R)), "bias": (bias, (O,))})
    require(OP, {"mask_in": (mask_in, (I,)), "mask_out": (mask_out, (O,))})
    gate = _flat_gate(gate, lead, R)
    _refuse_unfrozen(x, weight, bias)
    if not 0.0 <= dropout < 1.0 or (dropout > 0.0 and seed is None):
        raise ValueError(f"{OP}: dropout must be in [0, 1) and needs a seed, got dropout={dropout}, seed={seed}")
    if dropout > 0.0 and not torch.compiler.is_compiling() and capturing(x.device):
        raise ValueError(
            f"{OP}: dropout={dropout} in a CUDA graph would drop the same entries at every replay, since its seed is "
            "a number; capture with dropout=0, or run this step without a graph"
        )
    x_TI = x.reshape(math.prod(lead), I)  # not -1, which nothing determines where I is 0
    layer = LoraOperands(weight, a, b, bias, gate, mask_in, mask_out, float(scale), float(dropout), seed or 0)
    y = _linear(x_TI, *layer, backend)[0] if by_kernels(OP, x, backend) else _eager(x_TI, *layer)
    return y.view(*lead, O)


def _flat_gate(gate: Tensor | None, lead: torch.Size, R: int) -> Tensor | None:
    """The gate as ``[R]`` or ``[T, R]``. Raises ValueError for any other shape than the op takes."""
    if gate is None:
        return None
    if gate.dim() == 1:
        require(OP, {"gate": (gate, (R,))})
        return gate
    require(OP, {"gate": (gate, (*lead, R))})
    return gate.reshape(math.prod(lead), R)


def _refuse_unfrozen(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise ValueError where weight is of another dtype than x, or would get a gradient, or bias would."""
    if weight.dtype != x.dtype:
        raise ValueError(f"{OP}: x is {x.dtype} but weight is {weight.dtype}; cast one, or run under torch.autocast")
    if torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        raise ValueError(f"{OP}: weight and bias are frozen and get no gradient; call requires_grad_(False) on them")


@torch.library.custom_op("apt_kernels::masked_lora_linear", mutates_args=())
def _linear(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    mask_in: Tensor | None,
    mask_out: Tensor | None,
    scale: float,
    dropout: float,
    seed: int,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """Output ``[T, O]``, and z ``[T, P]`` for backward: the rank padded to a multiple of 16."""
    name = choose(OP, x, backend, (*x.shape, weight.shape[0], a.shape[0]))
    count(OP, name)
    layer = LoraOperands(weight, a, b, bias, gate, mask_in, mask_out, scale, dropout, seed)
    if name == "torch":
        y, z = eager.lora_linear(x, layer)
        return y, torch.nn.functional.pad(z, (0, padded_rank(a.shape[0]) - a.shape[0]))
    from apt_kernels import masked_lora

    return masked_lora.forward(name, rows_contiguous(x), layer._replace(weight=rows_contiguous(weight)))


@_linear.register_fake
def _(x: Tensor, weight: Tensor, a: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], padded_rank(a.shape[0]))


@torch.library.custom_op("apt_kernels::masked_lora_linear_backward", mutates_args=())
def _linear_backward(
    dy: Tensor,
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    gate: Tensor | None,
    mask_in: Tensor | None,
    mask_out: Tensor | None,
    scale: float,
    dropout: float,
    seed: int,
    backend: str | None,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, a, b and gate; an empty tensor where `needs` does not ask."""
    name = choose(OP, x, backend, (*x.shape, weight.shape[0], a.shape[0]))
    count(f"{OP}_backward", name)
    layer = LoraOperands(weight, a, b, None, gate, mask_in, mask_out, scale, dropout, seed)
    asked = LoraNeeds(*needs)
    if name == "torch":
        grads = eager.lora_linear_backward(dy, x, z[:, : a.shape[0]], layer, asked)
    else:
        from apt_kernels import masked_lora

        layer = layer._replace(weight=rows_contiguous(weight))
        grads = masked_lora.backward(name, rows_contiguous(dy), rows_contiguous(x), z, layer, asked)
    return or_empty(grads.x, x), or_empty(grads.a, x), or_empty(grads.b, x), or_empty(grads.gate, x)


@_linear_backward.register_fake
def _(
    dy: Tensor, x: Tensor, z: Tensor, weight: Tensor, a: Tensor, b: Tensor, gate: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    needs = rest[-1]
    sources = (x, a, b, x if gate is None else gate)
    return tuple(
        torch.empty_like(source, memory_format=torch.contiguous_format) if need else x.new_empty(0)
        for source, need in zip(sources, needs, strict=True)
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, *operands, ctx.backend = inputs
    save(ctx, x, output[1], LoraOperands(*operands))
    ctx.set_materialize_grads(False)


def _linear_gradients(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return LoraGrads().at(INPUTS)
    x, z, layer, needs = saved(ctx)
    weight, a, b, _, *rest = layer
    found = _linear_backward(dy, x, z, weight, a, b, *rest, ctx.backend, list(needs))
    return LoraGrads(*(grad if need else None for grad, need in zip(found, needs, strict=True))).at(INPUTS)


_linear.register_autograd(_linear_gradients, setup_context=_save)
