"""The layers of a plain decoder as tensors by role, each with sizes of its own, and how zeros are added to them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from apt.families import Anatomy, EmptyAttention, Layer, PlacedPart
from apt.families.anatomy import head_size
from apt.families.linears import weight_and_bias

ATTENTION = ("q", "k", "v", "o")
READERS = ("o", "down")  # roles whose columns are units; those of the others are rows


@dataclass(frozen=True)
class HeadShape:
    """What all heads of a model have in common.

    Args:
        queries: query heads of one KV head.
        size: features of a head.
        scale: of the scores of each layer, ``[L]``; None of a layer without heads.
    """

    queries: int
    size: int
    scale: list[float | None]


@dataclass(frozen=True)
class Block:
    """One layer.

    Args:
        weights: by role, ``[O, I]``; of a layer without heads or neurons they have no rows, or no columns.
        biases: by role, ``[O]``, those that are there.
        norms: by name in the layer, weight and bias.
        heads: KV heads.
        neurons: of its FFN.
    """

    weights: dict[str, Tensor]
    biases: dict[str, Tensor]
    norms: dict[str, tuple[Tensor, Tensor | None]]
    heads: int
    neurons: int


def read_blocks(anatomy: Anatomy, norms: Sequence[str]) -> tuple[list[Block], HeadShape, set[str]]:
    """All layers of a plain decoder with one stack.

    Args:
        anatomy: of the model.
        norms: names of the norms of a layer; one that went with its attention is left out.

    Returns:
        The layers, their heads' shape, and the names of the parameters that were read.
    """
    config: Any = anatomy.model.config
    heads = int(config.num_attention_heads)
    queries = heads // int(getattr(config, "num_key_value_heads", None) or heads)
    modules: list[Any] = [part.module for part in anatomy.attentions]
    alive = [module for module in modules if not isinstance(module, EmptyAttention)]
    scale = [None if isinstance(module, EmptyAttention) else float(module.scaling) for module in modules]
    shape = HeadShape(queries, head_size(alive[0]), scale)
    read: set[str] = set()
    blocks = [_read_block(anatomy, layer, norms, shape, read) for layer in anatomy.layers]
    return blocks, shape, read


def _read_block(anatomy: Anatomy, layer: Layer, norms: Sequence[str], shape: HeadShape, read: set[str]) -> Block:
    parts = [part for part in anatomy.parts if part.layer == layer]
    attention, ffn = parts
    found: dict[str, tuple[Tensor, Tensor | None]] = {}
    for part in parts:
        found |= _linears(part, shape, read)
    heads, neurons = attention.num_units, ffn.num_units
    if not heads:
        found |= _no_heads(attention, hidden=found["down"][0].shape[0], read=read)
    read_norms = {}
    for name in norms:
        module: Any = dict(layer.module.named_modules()).get(name)
        if module is not None:
            read_norms[name] = (module.weight.detach().float(), _float(getattr(module, "bias", None)))
            read |= {f"{layer.path}.{name}.weight", f"{layer.path}.{name}.bias"}
    weights = {role: weight for role, (weight, _) in found.items()}
    biases = {role: bias for role, (_, bias) in found.items() if bias is not None}
    return Block(weights, biases, read_norms, heads, neurons)


def _linears(part: PlacedPart, shape: HeadShape, read: set[str]) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Weight and bias of each role that is there, a fused projection in its parts."""
    found = {}
    for role, module in part.linears.items():
        weight, bias = weight_and_bias(module)
        found[role] = (weight.detach().float(), _float(bias))
        read |= {f"{part.paths[role]}.weight", f"{part.paths[role]}.bias"}
    path = part.fused_path
    if path is None or (not part.num_units and part.table.reader == "o"):
        return found
    weight, bias = weight_and_bias(part.layer.model.get_submodule(path))
    read |= {f"{path}.weight", f"{path}.bias"}
    units = part.num_units
    rows = {"q": units * shape.queries * shape.size, "k": units * shape.size, "v": units * shape.size}
    roles = part.table.same_input
    sizes = [rows.get(role, units) for role in roles]
    biases = [None] * len(roles) if bias is None else bias.detach().float().split(sizes)
    pairs = zip(weight.detach().float().split(sizes), biases, strict=True)
    return found | dict(zip(roles, pairs, strict=True))


def _no_heads(attention: PlacedPart, hidden: int, read: set[str]) -> dict[str, tuple[Tensor, Tensor | None]]:
    """What is left of an attention without heads: no rows, no columns, and its output bias."""
    module: Any = attention.module
    out: Any = module if isinstance(module, EmptyAttention) else attention.linears["o"]
    read |= {f"{attention.layer.path}.{attention.attention.module}.bias"}
    none = (torch.zeros(0, hidden), None)
    return {"q": none, "k": none, "v": none, "o": (torch.zeros(hidden, 0), _float(out.bias))}


def _float(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach().float()


def pad_block(block: Block, heads: int, neurons: int, like: Block, shape: HeadShape) -> Block:
    """The same function with more units, whose weights are zero.

    Args:
        block: a layer.
        heads: KV heads that it gets; no fewer than it has.
        neurons: the same.
        like: a layer that has heads and neurons: it tells which biases and norms there are.
        shape: of the heads.
    """
    rows = {"q": heads * shape.queries * shape.size, "k": heads * shape.size, "v": heads * shape.size}
    units = rows | {"o": rows["q"], "gate": neurons, "up": neurons, "down": neurons}
    weights = {role: _grown(weight, role in READERS, units[role]) for role, weight in block.weights.items()}
    biases = dict(block.biases)
    for role in like.biases:
        before = biases.get(role, torch.zeros(0))
        biases[role] = _grown(before, False, weights[role].shape[0])
    norms = {name: block.norms.get(name, norm) for name, norm in like.norms.items()}
    return replace(block, weights=weights, biases=biases, norms=norms, heads=heads, neurons=neurons)


def _grown(tensor: Tensor, columns: bool, size: int) -> Tensor:
    axis = int(columns)
    more = list(tensor.shape)
    more[axis] = size - tensor.shape[axis]
    return torch.cat([tensor, tensor.new_zeros(more)], dim=axis) if more[axis] else tensor
