"""A plain model of the stock class with the sizes of an export, and no numbers yet."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from apt.export.files import AGAIN, CARD
from apt.export.resize import resize_dimensions
from apt.families import Anatomy, Attention, anatomy_of
from apt.families.config_files import UNUSABLE, reason_of
from apt.families.linears import features, is_conv1d, make_linear, replace_module, weight_and_bias
from apt.layers.fused import restore_plain, split_fused
from apt.methods import METHODS
from apt.methods.prompts import place_plain_prompt


def empty_model(kind: Any, config: Any, card: dict[str, Any], folder: Path) -> Any:
    """The model of an export, with its sizes and without numbers.

    Args:
        kind: class of the model.
        config: of the export.
        card: what else it says.
        folder: that messages name.

    Raises:
        ValueError: config or card make no model.
    """
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        try:
            model = kind(config)
        except UNUSABLE as error:
            raise ValueError(
                f"load_model: {folder / 'config.json'} makes no {card['class']}: {reason_of(error)}"
            ) from None
        if card["units"]:
            _resize(anatomy_of(model), card, folder)
        if card.get("prompt") is not None:
            place_plain_prompt(anatomy_of(model), *_prompt_of(card["prompt"], folder))
    return model


def _prompt_of(entry: Any, folder: Path) -> tuple[str, int]:
    """Method and virtual tokens of what `_describe` wrote. Raises ValueError where it is corrupt."""
    if isinstance(entry, dict):
        method = entry.get("method")
        count = entry.get("virtual_tokens")
        if method in METHODS and METHODS[method].prompt and isinstance(count, int) and count >= 1:
            return str(method), count
    raise ValueError(f"load_model: {folder / CARD} is corrupt (prompt is off); {AGAIN}")


def _resize(anatomy: Anatomy, card: dict[str, Any], folder: Path) -> None:
    """Give the linears of an empty model the sizes of an export; the weights follow."""
    units = card["units"]
    orders = card.get("head_order", {})
    hidden = card.get("hidden")
    parts = {part.name: part for part in anatomy.parts}
    if units.keys() != parts.keys():
        raise ValueError(f"load_model: {folder / CARD} is corrupt (it lists {len(units)} unit groups); {AGAIN}")
    over = next((name for name, part in parts.items() if units[name] > part.num_units), None)
    if over is not None:
        told = f"{over} has {units[over]} of {parts[over].num_units} units"
        raise ValueError(f"load_model: {folder / CARD} is corrupt ({told}); {AGAIN}")
    split_fused(anatomy)
    if hidden is not None:
        resize_dimensions(anatomy, hidden)
    for name, part in parts.items():
        linears = part.linears
        before = part.num_units
        table = part.table
        layer = part.layer.module
        for role in table.producers:
            if role in linears:
                _set_size(layer, table.linears[role], out=features(linears[role])[0] // before * units[name])
        into = features(linears[table.reader])[1] // before * units[name]
        _set_size(layer, table.linears[table.reader], into=into)
        if isinstance(table, Attention):
            order = torch.tensor(orders[name]) if name in orders else None
            lacks = order is None and table.follow is not None and 0 < units[name] < before
            if lacks or (order is not None and (order.shape != (units[name],) or (order >= before).any())):
                raise ValueError(f"load_model: {folder / CARD} is corrupt (head_order of {name} is off); {AGAIN}")
            table.set_heads(layer, before, units[name], order)
            if units[name] == 0:
                table.remove(layer)
    restore_plain(anatomy.model, merge=False)


def _set_size(layer: nn.Module, name: str, *, out: int | None = None, into: int | None = None) -> None:
    """Put a linear of that kind, with another number of outputs or inputs and no numbers yet, in the place of one."""
    linear = layer.get_submodule(name)
    weight, bias = weight_and_bias(linear)
    out = weight.shape[0] if out is None else out
    into = weight.shape[1] if into is None else into
    empty_weight = weight.new_empty(out, into, device="meta")
    empty_bias = None if bias is None else bias.new_empty(out, device="meta")
    replace_module(layer, name, make_linear(empty_weight, empty_bias, conv1d=is_conv1d(linear)))
