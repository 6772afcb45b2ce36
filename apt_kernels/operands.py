"""What the adapted linear layer computes with, by name: all that stands behind the flat registered ops takes this.

Dimension key: T tokens, I in, O out, R rank.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

Grad = Tensor | None


class LoraOperands(NamedTuple):
    """All but the input, in the order of the registered op. What is left at its default does nothing."""

    weight: Tensor  # [O, I], frozen
    a: Tensor  # [R, I]
    b: Tensor  # [O, R]
    bias: Tensor | None = None  # [O], frozen
    gate: Tensor | None = None  # [R] or [T, R]
    mask_in: Tensor | None = None  # [I]
    mask_out: Tensor | None = None  # [O]
    scale: float = 1.0
    dropout: float = 0.0  # probability
    seed: int = 0  # of the dropout


class LoraNeeds(NamedTuple):
    """Which gradients are asked for."""

    x: bool
    a: bool
    b: bool
    gate: bool


class LoraGrads(NamedTuple):
    """The gradients of what learns; None where not asked for."""

    x: Grad = None
    a: Grad = None
    b: Grad = None
    gate: Grad = None

    def at(self, inputs: Sequence[str]) -> tuple[Grad, ...]:
        """The gradient of each input of an op by its name, None where it does not learn."""
        return tuple(getattr(self, name, None) for name in inputs)


def save(ctx: Any, x_TI: Tensor, z: Tensor, layer: LoraOperands) -> None:
    """Keep for backward what `saved` gives again: all but the bias. Only x and z are no part of the model."""
    weight, a, b, _, gate, mask_in, mask_out, *ctx.settings = layer
    ctx.save_for_backward(x_TI, z, weight, a, b, gate, mask_in, mask_out)


def saved(ctx: Any) -> tuple[Tensor, Tensor, LoraOperands, LoraNeeds]:
    """x, z and the layer as `save` kept them, and which gradients are asked for."""
    x_TI, z, weight, a, b, *gate_and_masks = ctx.saved_tensors
    needs_x, _, needs_a, needs_b, _, needs_gate, *_ = ctx.needs_input_grad
    layer = LoraOperands(weight, a, b, None, *gate_and_masks, *ctx.settings)
    return x_TI, z, layer, LoraNeeds(needs_x, needs_a, needs_b, needs_gate)


def layers_of(
    weights: Sequence[Tensor], a: Sequence[Tensor], b: Sequence[Tensor], biases: Sequence[Tensor | None], scale: float
) -> list[LoraOperands]:
    """Unmasked layers that share their input, out of one list a part."""
    parts = zip(weights, a, b, biases, strict=True)
    return [LoraOperands(*own, scale=scale) for own in parts]


def ranks(layers: Sequence[LoraOperands]) -> list[int]:
    """The rank of each layer: where its part of a common product ends."""
    return [layer.a.shape[0] for layer in layers]


def save_group(ctx: Any, x_TI: Tensor, z: Tensor, layers: Sequence[LoraOperands]) -> None:
    """Keep for backward what `saved_group` gives again."""
    ctx.save_for_backward(x_TI, z, *(tensor for layer in layers for tensor in layer[:3]))
    ctx.scale = layers[0].scale


def saved_group(ctx: Any) -> tuple[Tensor, Tensor, list[LoraOperands]]:
    """x, z and the layers, without their biases, as `save_group` kept them."""
    x_TI, z, *flat = ctx.saved_tensors
    return x_TI, z, layers_of(flat[::3], flat[1::3], flat[2::3], [None] * (len(flat) // 3), ctx.scale)
