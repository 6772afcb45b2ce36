"""Gives an empty plain model the number of hidden dimensions that an export was saved with."""

from torch import nn

from apt.families import Anatomy
from apt.families.linears import features, is_conv1d, make_linear, replace_module, weight_and_bias
from apt.surgery.hidden import tell_width


def resize_dimensions(anatomy: Anatomy, num: int) -> None:
    """Give an empty plain model (meta device) that many hidden dimensions; its numbers are loaded afterwards."""
    for part in anatomy.hidden_parts():
        if part.kind == "linear":
            replace_module(anatomy.model, part.name, _narrow_linear(part.module, part.axes, num))
            continue
        for attribute, axis in part.held:
            parameter = getattr(part.module, attribute, None)
            if parameter is not None:
                shape = list(parameter.shape)
                shape[axis] = num
                setattr(part.module, attribute, nn.Parameter(parameter.new_empty(shape)))
        tell_width(part, num)


def _narrow_linear(linear: nn.Module, axes: tuple[str, ...], num: int) -> nn.Module:
    """A plain linear of the same kind with `num` inputs ("in") or outputs ("out"), without numbers."""
    weight, bias = weight_and_bias(linear)
    sizes = list(features(linear))
    for axis in axes:
        sizes[0 if axis == "out" else 1] = num
    empty = None if bias is None else bias.new_empty(sizes[0])
    return make_linear(weight.new_empty(sizes), empty, conv1d=is_conv1d(linear))
