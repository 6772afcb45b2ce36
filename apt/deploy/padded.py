"""A model whose layers have sizes of their own, padded with zeros to the least uniform shape of its stock class.

A head (KV group) or a neuron of zeros adds nothing: the columns that read it are zeros too. So the model computes the
same function, and any program that knows the stock class runs it. All its layers are as slow as the largest.
"""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from apt.deploy.source import Source
from apt.export.stock import described_class, stock_class, stock_config
from apt.families import Anatomy, Attention, EmptyAttention, PlacedPart, anatomy_of
from apt.families.base import find_module
from apt.families.linears import features, is_conv1d, is_linear, weight_and_bias
from apt.layers.fused import part_sizes, split_linear

TITLES = {"head": "heads (KV groups)", "neuron": "neurons"}


def why_not_padded(source: Source, least: Mapping[str, int] | None = None) -> str | None:
    """Say what no stock configuration can say, however the layers are padded; None where one can.

    Args:
        source: of the model.
        least: as in `least_config`.
    """
    for entry, words in (("gates", "it has gates that depend on the example"), ("prompt", "it has virtual tokens")):
        if source.card.get(entry) is not None:
            return words
    if source.anatomy is None:
        return None if source.is_stock else str(source.card.get("why_not_stock"))
    return least_config(source.anatomy, least)[1]


def least_config(anatomy: Anatomy, least: Mapping[str, int] | None = None) -> tuple[Any, str | None]:
    """The stock configuration of the smallest uniform shape that holds every layer.

    The number of neurons is that of the largest layer. That of heads is the next at or above which the configuration
    can say: some derive the size of a head from the number of heads, or ask that it divides the hidden size.

    Args:
        anatomy: of a plain model.
        least: that each layer is to have, by the kind of units: "head" (KV groups), "neuron".

    Returns:
        A copy of the config with these counts and None; or the config, and what it cannot say.
    """
    model: Any = anatomy.model
    with init_empty_weights(include_buffers=False):
        stock = anatomy_of(stock_class(model)(model.config))
    width = stream_width(anatomy)
    hidden = 0 if width == stream_width(stock) else width
    now, before = anatomy.num_units(), stock.num_units()
    names = {kind: [part.name for part in anatomy.parts if part.table.kind == kind] for kind in TITLES}
    fewest = {kind: max(1, (least or {}).get(kind, 1), *(now[name] for name in found)) for kind, found in names.items()}
    most = max(fewest["head"], *(before[name] for name in names["head"]))
    config, reason = model.config, None
    for heads in range(fewest["head"], most + 1):
        chosen = {"head": heads, "neuron": fewest["neuron"]}
        units = {part.name: chosen[part.table.kind] for part in anatomy.parts}
        config, reason = stock_config(anatomy, units, {}, hidden)
        if reason is None:
            break
    return config, reason


def padded_model(anatomy: Anatomy, least: Mapping[str, int] | None = None) -> Any:
    """A model of the stock class, of a uniform shape, that computes what the given one does.

    Args:
        anatomy: of a plain model, which is not changed; what needs no padding is shared with it.
        least: as in `least_config`.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: no stock configuration can say it; `why_not_padded` tells so before.
    """
    config, reason = least_config(anatomy, least)
    if reason is not None:
        raise ValueError(f"export: no padding makes this model a stock one: {reason}")
    model: Any = anatomy.model
    with init_empty_weights(include_buffers=False):
        made: Any = described_class(model, config)(config)
    wanted = made.state_dict()
    there = model.state_dict()
    state = {name: there[name] for name, tensor in wanted.items() if _fits(there.get(name), tensor)}
    parts = {part.name: part for part in anatomy.parts}
    gone = [f"{part.layer.path}.{part.attention.module}." for part in anatomy.attentions if part.num_units == 0]
    for target in anatomy_of(made).parts:
        state |= _padded_part(parts[target.name], target, model.dtype)
    for name in wanted.keys() - state.keys():  # norms of heads that are zeros
        assert name.startswith(tuple(gone)), f"{name} is nowhere in the model"
        state[name] = torch.zeros(wanted[name].shape, dtype=model.dtype)
    made.load_state_dict(state, assign=True)
    made.tie_weights()
    if model.can_generate():
        made.generation_config = model.generation_config
    return made.eval()


def padding_notes(anatomy: Anatomy, padded: Anatomy) -> list[str]:
    """How many heads and neurons of a padded model are zeros, a line each."""
    before, after = anatomy.num_units(), padded.num_units()
    notes = []
    for kind, title in TITLES.items():
        names = [part.name for part in anatomy.parts if part.table.kind == kind]
        stored, real = sum(after[name] for name in names), sum(before[name] for name in names)
        if stored > real:
            notes.append(
                f"{stored - real} of {stored} {title} are padding: zeros, up to {after[names[0]]} in each layer"
            )
    return notes


def heads_by_width(anatomy: Anatomy) -> int | None:
    """Heads (KV groups) where the size of a head is the hidden size over the number of query heads.

    Some programs take it so, whatever a configuration says. None where no number of heads gives the size that the heads
    have, or one smaller than some layer has.
    """
    config: Any = anatomy.model.config
    group = config.num_attention_heads // config.num_key_value_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads, rest = divmod(stream_width(anatomy), size * group)
    return None if rest or heads < max(part.num_units for part in anatomy.attentions) else heads


def lacks_heads(anatomy: Anatomy, least: Mapping[str, int]) -> bool:
    """Whether some layer has fewer heads than a program asks for."""
    return any(part.num_units < least.get("head", 0) for part in anatomy.attentions)


def stream_width(anatomy: Anatomy) -> int:
    """Hidden dimensions, as what writes to the stream has them."""
    readers = [part.reader for part in anatomy.parts]
    return next(features(reader)[0] for reader in readers if reader is not None)


def _fits(there: Tensor | None, wanted: Tensor) -> bool:
    return there is not None and there.shape == wanted.shape


def _padded_part(part: PlacedPart, target: PlacedPart, dtype: torch.dtype) -> dict[str, Tensor]:
    """The linears of an attention or FFN under their stock names, with zeros for the units that the part lacks."""
    linears = _plain_linears(part)
    lost = part.module.bias if isinstance(part.module, EmptyAttention) else None  # of an output projection that went
    order = part.table.head_order(part.layer.module) if isinstance(part.table, Attention) else None
    place = torch.arange(part.num_units) if order is None else order[: part.num_units]  # the shared bias of T5 knows it
    padded: dict[str, tuple[Tensor, Tensor | None]] = {}
    for role, (like_OI, like_O) in _plain_linears(target).items():
        weight_OI, bias_O = linears.get(role, (None, None))
        if role == part.table.reader:
            columns = None if weight_OI is None else weight_OI.T
            kept = bias_O if role in linears else lost
            padded[role] = _spread(columns, like_OI.T, place, target.num_units, dtype).T, kept
        else:
            rows = None if like_O is None else _spread(bias_O, like_O, place, target.num_units, dtype)
            padded[role] = _spread(weight_OI, like_OI, place, target.num_units, dtype), rows
    return _named(target, padded)


def _plain_linears(part: PlacedPart) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Role -> weight ``[O, I]`` and bias ``[O]``; those of one stored projection apart."""
    found: dict[str, nn.Module] = part.linears
    fused = None if part.fused_path is None else find_module(part.layer.model, part.fused_path)
    if fused is not None and is_linear(fused):
        found |= dict(split_linear(fused, part_sizes(fused, part)).named_children())
    return {role: weight_and_bias(linear) for role, linear in found.items()}


def _spread(rows: Tensor | None, like: Tensor, place: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """The rows of units at their places among `count`; all others are zeros. Rows ``[units * per, ...]``."""
    made = torch.zeros(count, like.shape[0] // count, *like.shape[1:], dtype=dtype)
    if rows is not None and len(place):
        made[place] = rows.detach().reshape(len(place), *made.shape[1:])
    return made.flatten(0, 1)


def _named(target: PlacedPart, padded: dict[str, tuple[Tensor, Tensor | None]]) -> dict[str, Tensor]:
    """Tensors by role under the names that the stock model has for them, as it stores them."""
    stored = {target.paths[role]: tensors for role, tensors in padded.items()}
    if target.fused_path is not None:
        parts = [stored.pop(target.paths[role]) for role in target.table.same_input]
        biases = [bias for _, bias in parts if bias is not None]
        stored[target.fused_path] = torch.cat([weight for weight, _ in parts]), torch.cat(biases) if biases else None
    state = {}
    for path, (weight_OI, bias_O) in stored.items():
        turned = is_conv1d(target.layer.model.get_submodule(path))
        state[f"{path}.weight"] = (weight_OI.T if turned else weight_OI).contiguous()
        if bias_O is not None:
            state[f"{path}.bias"] = bias_O
    return state
