"""The parts of one model: linears by role, heads, units that are left."""

from typing import Any

from torch import nn

from apt.families.base import FFN, Attention, Family, Layer
from apt.families.empty import EmptyAttention
from apt.families.linears import features


def head_size(attention: nn.Module) -> int:
    """Features of one head of an attention module."""
    sizes = (getattr(attention, name, None) for name in ("head_dim", "attention_head_size", "key_value_proj_dim"))
    size = next((size for size in sizes if size), None)
    assert isinstance(size, int), f"{type(attention).__name__} names no head size"
    return size


def required_heads(model: nn.Module, family: Family) -> set[str]:
    """Unit groups that must keep a head (KV group).

    In a decoder the first layer of each attention type: cached generation reads the cache and mask lengths there. And
    the last cross-attention, without which nothing of the input would reach the output.
    """
    layers = family.layers(model)
    types = list(getattr(getattr(model, "config", None), "layer_types", None) or [])
    first = {0} | {types.index(kind) for kind in set(types)}
    required = set()
    for stack in {layer.stack for layer in layers if layer.stack.decoder}:
        last = max(layer.index for layer in layers if layer.stack == stack)
        for part in stack.parts:
            if isinstance(part, Attention):
                kept = {last} if part.cross else first
                required |= {f"{stack.name}.{index}.{part.units}" for index in kept}
    return required


def part_linears(layer: Layer, part: Attention | FFN) -> dict[str, nn.Module]:
    """Role -> linear of one part of a layer; what went with its attention is left out."""
    there = {}
    for role, name in part.linears.items():
        try:
            there[role] = layer.module.get_submodule(name)
        except AttributeError:
            continue
    return there


def num_units(layer: Layer, part: Attention | FFN) -> int:
    """Heads (KV groups) or neurons of one part of a layer, from the rows of its linears."""
    rows, _ = features(part_linears(layer, part)[part.counted])
    return rows // (head_size(layer.module.get_submodule(part.module)) if isinstance(part, Attention) else 1)


def present_units(model: nn.Module, family: Family) -> dict[str, int]:
    """Heads (KV groups) and neurons of every part of any model, patched or not, from what its last linears read."""
    config: Any = model.config
    heads = int(config.num_attention_heads)
    together = heads // int(getattr(config, "num_key_value_heads", None) or heads)  # query heads of a group
    counts = {}
    for layer in family.layers(model):
        for part in layer.stack.parts:
            count, reader = 0, part_linears(layer, part).get(part.reader)
            module = layer.module.get_submodule(part.module) if isinstance(part, Attention) else None
            if reader is not None and not isinstance(module, EmptyAttention):
                count = features(reader)[1] // (1 if module is None else head_size(module) * together)
            counts[f"{layer.name}.{part.units}"] = count
    return counts
