"""Plain linear layers: `nn.Linear`, and the `Conv1D` of GPT-2, which stores its weight the other way round."""

from typing import Any

import torch
from torch import Tensor, nn


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of the one with that full name, in the model's mode."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module.train(model.training))


CONV1D = ("transformers.pytorch_utils", "Conv1D")  # by name: transformers is not imported for it


def is_conv1d(module: nn.Module | None) -> bool:
    """Whether a layer is transformers' ``Conv1D``: weight ``[I, O]``, always a bias."""
    return any((kind.__module__, kind.__name__) == CONV1D for kind in type(module).__mro__)


def is_linear(module: nn.Module | None) -> bool:
    """Whether a layer is one that an adapter can take the place of."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def features(linear: nn.Module) -> tuple[int, int]:
    """Outputs and inputs of a linear, a plain or an adapted one."""
    layer: Any = linear
    return (layer.nf, layer.nx) if is_conv1d(linear) else (layer.out_features, layer.in_features)


def weight_and_bias(linear: nn.Module) -> tuple[nn.Parameter, nn.Parameter | None]:
    """Weight ``[O, I]`` and bias ``[O]`` of either kind, frozen; of a `Conv1D` the weight is a copy, turned."""
    layer: Any = linear
    layer.requires_grad_(False)
    if is_conv1d(linear):
        return nn.Parameter(layer.weight.detach().T.contiguous(), requires_grad=False), layer.bias
    return layer.weight, layer.bias


def make_linear(weight_OI: Tensor, bias_O: Tensor | None = None, *, conv1d: bool = False) -> nn.Module:
    """A plain, frozen layer of these numbers, which it takes over.

    A layer without inputs is an `nn.Linear` in any case: the forward of `Conv1D` cannot reshape an empty tensor.
    """
    outputs, inputs = weight_OI.shape
    weight = weight_OI.detach()
    layer = _empty_linear(outputs, inputs, bias_O is not None, conv1d and inputs > 0)
    layer.weight = nn.Parameter(weight.T.contiguous() if is_conv1d(layer) else weight, requires_grad=False)
    if bias_O is not None:
        layer.bias = nn.Parameter(bias_O.detach(), requires_grad=False)
    return layer


def _empty_linear(outputs: int, inputs: int, bias: bool, conv1d: bool) -> nn.Module:
    layer: Any
    with torch.device("meta"):  # made small, as there is nothing to initialise
        if conv1d:
            from transformers.pytorch_utils import Conv1D

            layer = Conv1D(1, 1)
            layer.nf, layer.nx = outputs, inputs
        else:
            layer = nn.Linear(1, 1, bias=bias)
            layer.out_features, layer.in_features = outputs, inputs
    made: nn.Module = layer
    return made
