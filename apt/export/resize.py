"""Gives an empty plain model the number of hidden dimensions that an export was saved with."""

from typing import Any

from torch import nn

from apt.families import Anatomy
from apt.families.linears import features, is_conv1d, make_linear, replace_module, weight_and_bias


def resize_dimensions(anatomy: Anatomy, num: int) -> None:
    """Give an empty plain model (meta device) that many hidden dimensions; its numbers are loaded afterwards."""

    def narrow(module: Any, name: str, dim: int) -> None:
        parameter = getattr(module, name, None)
        if parameter is not None:
            shape = list(parameter.shape)
            shape[dim] = num
            setattr(module, name, nn.Parameter(parameter.new_empty(shape)))

    for part in anatomy.hidden_parts():
        module: Any = part.module
        if part.kind == "norm":
            narrow(module, "weight", 0)
            narrow(module, "bias", 0)
            if isinstance(module, nn.LayerNorm):
                module.normalized_shape = (num,)
        elif part.kind == "embedding":
            narrow(module, "weight", 1)
            module.embedding_dim = num
        elif part.kind == "linear":
            replace_module(anatomy.model, part.name, _narrow_linear(module, part.axes, num))


def _narrow_linear(linear: nn.Module, axes: tuple[str, ...], num: int) -> nn.Module:
    """A plain linear of the same kind with `num` inputs ("in") or outputs ("out"), without numbers."""
    (weight, bias), sizes = weight_and_bias(linear), list(features(linear))
    for axis in axes:
        sizes[0 if axis == "out" else 1] = num
    empty = None if bias is None else bias.new_empty(sizes[0])
    return make_linear(weight.new_empty(sizes), empty, conv1d=is_conv1d(linear))
