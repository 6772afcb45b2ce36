"""The public op of adapted linear layers that share their input (q, k, v; gate, up), registered as a whole."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from apt_kernels import eager
from apt_kernels._triton import rows_contiguous
from apt_kernels.autocast import cast_for_product
from apt_kernels.operands import LoraOperands, layers_of, ranks, save_group, saved_group
from apt_kernels.ops.registered import or_empty
from apt_kernels.selection import by_kernels, choose, count, require
from apt_kernels.tiles import padded_rank

OP = "masked_lora_linears"


def masked_lora_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    *,
    scale: float,
    biases: Sequence[Tensor | None] | None = None,
    mask_in: Tensor | None = None,
    backend: str | None = None,
) -> list[Tensor]:
    """Several adapted frozen linear layers on one input: ``y_k = W_k xm + b_k + s * B_k A_k xm``, ``xm = m_in * x``.

    Equal to `masked_lora_linear` layer by layer, in fewer passes: x is read once for all A, once for all their
    gradients, and the gradients of x are added where they are made.

    Args:
        x: shared input, ``[..., I]``; under autocast x and weights are cast to its dtype, but for float64.
        weights: frozen, each ``[O_k, I]`` in the dtype of x.
        a: each ``[R_k, I]``; a layer without adapter has R_k = 0.
        b: each ``[O_k, R_k]``.
        scale: unitless, the constant s.
        biases: frozen, each ``[O_k]`` or None; None is none at all.
        mask_in: ``[I]``, 1 kept, 0 pruned, between while it decays. None where the producer of x applied it.
        backend: forces an implementation; None chooses.

    Returns:
        One ``[..., O_k]`` a layer, in the dtype of x.

    Raises:
        ValueError: shapes or dtypes disagree, a weight requires a gradient, or the backend does not exist.
    """
    x, *weights = cast_for_product(x, *weights)
    biases = [None] * len(weights) if biases is None else biases
    if not len(weights) == len(a) == len(b) == len(biases):
        raise ValueError(
            f"{OP}: one of each a layer, got {len(weights)} weights, {len(a)} a, {len(b)} b, {len(biases)} biases"
        )
    I, lead = x.shape[-1], x.shape[:-1]
    require(OP, {"mask_in": (mask_in, (I,))})
    for number, (weight, a_RI, b_OR, bias) in enumerate(zip(weights, a, b, biases, strict=True)):
        O, R = weight.shape[0], a_RI.shape[0]
        shapes = {"weight": (weight, (O, I)), "a": (a_RI, (R, I)), "b": (b_OR, (O, R)), "bias": (bias, (O,))}
        require(OP, {f"{name} {number}": pair for name, pair in shapes.items()})
        if weight.dtype != x.dtype:
            raise ValueError(f"{OP}: x is {x.dtype} but weight {number} is {weight.dtype}; cast one")
        if torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)):
            raise ValueError(f"{OP}: weights and biases are frozen and get no gradient; call requires_grad_(False)")
    x_TI = x.reshape(math.prod(lead), I)
    if mask_in is not None:
        x_TI = x_TI * mask_in.to(x.dtype)  # once for all layers
    if by_kernels(OP, x, backend):
        # torch registers gradients of lists of tensors, but not of lists with holes: no bias is an empty one.
        filled = [x.new_zeros(0) if bias is None else bias for bias in biases]
        outputs = _linears(x_TI, list(weights), list(a), list(b), filled, float(scale), backend)[:-1]
    else:
        outputs = eager.LoraLinears.apply(float(scale), x_TI, *weights, *a, *b, *biases)
    return [y.view(*lead, y.shape[1]) for y in outputs]


@torch.library.custom_op("apt_kernels::masked_lora_linears", mutates_args=())
def _linears(
    x: Tensor,
    weights: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    biases: Sequence[Tensor],
    scale: float,
    backend: str | None,
) -> list[Tensor]:
    """Outputs ``[T, O_k]``, and last z ``[T, P]`` for backward, every rank padded to a multiple of 16."""
    given = [bias if bias.numel() else None for bias in biases]
    layers = layers_of([rows_contiguous(weight) for weight in weights], a, b, given, scale)
    name = choose(OP, x, backend, _sizes(x, layers))
    count(OP, name)
    if name == "torch":
        outputs, z = eager.lora_linears(rows_contiguous(x), layers)
        return [*outputs, _spread(z, layers)]
    from apt_kernels import masked_lora_group

    outputs, z = masked_lora_group.forward(name, rows_contiguous(x), layers)
    return [*outputs, z]


@_linears.register_fake
def _(x: Tensor, weights: Sequence[Tensor], a: Sequence[Tensor], *_: Any) -> list[Tensor]:
    width = sum(padded_rank(len(a_RI)) for a_RI in a)
    return [*(x.new_empty(x.shape[0], weight.shape[0]) for weight in weights), x.new_empty(x.shape[0], width)]


@torch.library.custom_op("apt_kernels::masked_lora_linears_backward", mutates_args=())
def _linears_backward(
    dys: Sequence[Tensor],
    x: Tensor,
    z: Tensor,
    weights: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scale: float,
    needs_x: bool,
    backend: str | None,
) -> list[Tensor]:
    """Gradients of x (empty where not asked for), of every A, of every B."""
    layers = layers_of([rows_contiguous(weight) for weight in weights], a, b, [None] * len(a), scale)
    name = choose(OP, x, backend, _sizes(x, layers))
    count(f"{OP}_backward", name)
    x, dys = rows_contiguous(x), [rows_contiguous(dy) for dy in dys]
    if name == "torch":
        grad_x, grads_a, grads_b = eager.lora_linears_backward(dys, x, _gathered(z, layers), layers, needs_x)
    else:
        from apt_kernels import masked_lora_group

        grad_x, grads_a, grads_b = masked_lora_group.backward(dys, x, z, layers, needs_x)
    return [or_empty(grad_x, x), *grads_a, *grads_b]


@_linears_backward.register_fake
def _(
    dys: Sequence[Tensor], x: Tensor, z: Tensor, weights: Any, a: Sequence[Tensor], b: Sequence[Tensor], *rest: Any
) -> list[Tensor]:
    needs_x = rest[-2]
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if needs_x else x.new_empty(0)
    return [grad_x, *(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (*a, *b))]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, *parts, ctx.backend = inputs
    save_group(ctx, x, output[-1], layers_of(*parts))


def _gradients(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    x, z, layers = saved_group(ctx)
    weights = [layer.weight for layer in layers]
    a, b = [layer.a for layer in layers], [layer.b for layer in layers]
    needs_x, n = ctx.needs_input_grad[0], len(layers)
    grad_x, *rest = _linears_backward(grads[:-1], x, z, weights, a, b, ctx.scale, needs_x, ctx.backend)
    return grad_x if needs_x else None, [None] * n, rest[:n], rest[n:], [None] * n, None, None


_linears.register_autograd(_gradients, setup_context=_save)


def _sizes(x: Tensor, layers: Sequence[LoraOperands]) -> tuple[int, ...]:
    """Tokens, inputs, all outputs, all ranks."""
    return (*x.shape, sum(len(layer.weight) for layer in layers), sum(ranks(layers)))


def _spread(z_TR: Tensor, layers: Sequence[LoraOperands]) -> Tensor:
    """The columns of each layer's rank with zeros up to its padded rank."""
    parts = z_TR.split(ranks(layers), dim=1)
    padded = [torch.nn.functional.pad(part, (0, padded_rank(part.shape[1]) - part.shape[1])) for part in parts]
    return torch.cat(padded, dim=1)


def _gathered(z_TP: Tensor, layers: Sequence[LoraOperands]) -> Tensor:
    """`_spread` undone."""
    parts = z_TP.split([padded_rank(rank) for rank in ranks(layers)], dim=1)
    return torch.cat([part[:, :rank] for part, rank in zip(parts, ranks(layers), strict=True)], dim=1)
