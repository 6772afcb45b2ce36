"""A model whose layers have sizes of their own, as a subclass of the stock class: ``config.apt`` says the sizes.

This file, and what it imports of ours, are written into an export as one file, `modeling_apt.py`, which
``AutoModel.from_pretrained(folder, trust_remote_code=True)`` runs. It needs torch and transformers alone.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from apt.families.empty import EmptyAttention, EmptyGPT2Attention
from apt.families.layer_config import LayerConfig
from apt.families.t5_heads import EmptyT5Attention, WholeBias

STAND_INS = {kind.__name__: kind for kind in (EmptyAttention, EmptyGPT2Attention, EmptyT5Attention)}


class OwnSizes(nn.Module):
    """Before a stock class among the bases: makes its layers as small as ``config.apt`` says, before weights come."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # of the stock class, which comes next
        give_sizes(self, config.apt)


def give_sizes(model: Any, sizes: Mapping[str, Mapping[str, Any]]) -> None:
    """Give a stock model the sizes of an export.

    Args:
        model: whole, or without its head, whose names then lack their first part.
        sizes: by the full name of a module, or of a tensor: "empty": attentions without heads; "linear": layers that
            become `nn.Linear`; "tensors": shapes; "attributes" of modules; "config": values that a module reads from
            the config; "head_order": heads that a T5 attention has.
    """
    for name, (kind, out, weights, width) in sizes["empty"].items():
        place = _place(model, name)
        if place is not None:
            attention = model.get_submodule(place)
            inner = attention.get_submodule(out) if out else None
            empty = STAND_INS[kind](attention, inner, weights)
            empty.width = width
            _put(model, place, empty)
    for name, (outputs, inputs, bias) in sizes["linear"].items():
        place = _place(model, name)
        if place is not None:
            weight = next(model.get_submodule(place).parameters())
            _put(model, place, nn.Linear(inputs, outputs, bias=bias, device=weight.device, dtype=weight.dtype))
    for name, shape in sizes["tensors"].items():
        place = _place(model, name.rpartition(".")[0])
        if place is not None:
            leaf, module = name.rpartition(".")[2], model.get_submodule(place)
            setattr(module, leaf, nn.Parameter(getattr(module, leaf).new_empty(shape)))
    for name, values in sizes["attributes"].items():
        place = _place(model, name)
        for attribute, value in values.items() if place is not None else ():
            setattr(model.get_submodule(place), attribute, tuple(value) if isinstance(value, list) else value)
    for name, values in sizes["config"].items():
        place = _place(model, name)
        if place is not None:
            module = model.get_submodule(place)
            module.config = LayerConfig(module.config)
            for attribute, value in values.items():
                setattr(module.config, attribute, value)
    for name, order in sizes["head_order"].items():
        place = _place(model, name)
        if place is not None:
            module = model.get_submodule(place)
            WholeBias(module)
            # No buffer: a model that is made without memory loses what no file holds.
            module.head_order = torch.tensor(order, dtype=torch.long, device="cpu")


def _place(model: Any, name: str) -> str | None:
    """The name in this model; None of what belongs to a head that it does not have."""
    for place in (name, name.removeprefix(f"{model.base_model_prefix}.")):
        try:
            model.get_submodule(place)
            return place
        except AttributeError:
            continue
    return None


def _put(model: Any, place: str, module: nn.Module) -> None:
    parent, _, child = place.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
