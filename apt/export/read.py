"""An export back into a plain model of its stock class, with the sizes it was saved with."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from apt.export.files import AGAIN, CARD, WEIGHTS, read_card, read_weights
from apt.export.resize import resize_dimensions
from apt.export.row_gate_files import load_row_gates
from apt.export.ties import tie_what_is_equal
from apt.families import Anatomy, Attention, anatomy_of
from apt.families.config_files import UNUSABLE, check_model_folder, reason_of, state_reason_of
from apt.families.linears import features, is_conv1d, make_linear, replace_module, weight_and_bias
from apt.files.whole import find_whole
from apt.layers.fused import restore_plain, split_fused
from apt.methods import METHODS
from apt.methods.prompts import place_plain_prompt
from apt.surgery.save_notice import place_notice

NOTICE = (
    "apt: no configuration of transformers can say the sizes of this model, so save_pretrained writes what nobody can "
    "read; save it with apt.export_model(apt.patch_model(model, method='lora'), folder)"
)


def load_model(folder: str | Path, *, model_class: Any = None) -> nn.Module:
    """Load an export as a plain model of its stock class, in evaluation mode, with the layer sizes it was saved with.

    A model with gates that depend on the example comes patched, as it was trained.

    Args:
        folder: as `export_model` wrote it; ``~`` is the home folder.
        model_class: of a model that is none of transformers': a class of your own, or of code from the hub. It is the
            one that was exported; its ``config_class`` reads the config.

    Returns:
        The model, on the CPU.

    Raises:
        ValueError: the folder is not an export, a file is truncated or corrupt, a newer version made it, or it is of
            another class.
    """
    given = folder
    folder = find_whole(Path(folder).expanduser())
    if not folder.exists() and not _looks_local(given):
        raise ValueError(f"load_model: there is no folder {given}; an export on the hub has to be downloaded first")
    card = read_card(folder)
    from accelerate import init_empty_weights

    kind = _model_class(card["class"], model_class, folder)
    config = _read_config(folder, None if model_class is None else getattr(kind, "config_class", None))
    state = read_weights(folder, card)
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
    try:
        missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:
        reason = state_reason_of(error)
        raise ValueError(f"load_model: {folder / WEIGHTS} does not fit the model: {reason}") from None
    tie_what_is_equal(model, state, set(missing))
    absent = [name for name, tensor in model.named_parameters() if tensor.is_meta]
    if absent or unexpected:
        raise ValueError(
            f"load_model: {folder / WEIGHTS} does not fit the model: {(absent + list(unexpected))[0]} is off"
        )
    plain: nn.Module = model.eval().requires_grad_(True)
    if not card.get("stock", True):
        place_notice(plain, NOTICE)
    if card.get("gates") is not None:
        load_row_gates(plain, folder, card["gates"])
    return plain


def _prompt_of(entry: Any, folder: Path) -> tuple[str, int]:
    """Method and virtual tokens of what `_describe` wrote. Raises ValueError where it is corrupt."""
    if isinstance(entry, dict):
        method = entry.get("method")
        count = entry.get("virtual_tokens")
        if method in METHODS and METHODS[method].prompt and isinstance(count, int) and count >= 1:
            return str(method), count
    raise ValueError(f"load_model: {folder / CARD} is corrupt (prompt is off); {AGAIN}")


def _looks_local(folder: str | Path) -> bool:
    """Whether it is written as a path, which no name on the hub is."""
    return isinstance(folder, Path) or str(folder).startswith((".", "/", "~")) or str(folder).count("/") != 1


def _read_config(folder: Path, kind: Any) -> Any:
    """The config of an export, read by its class, or by the one that its ``model_type`` names."""
    from transformers import AutoConfig

    if not (folder / "config.json").exists():
        raise ValueError(f"load_model: {folder / 'config.json'} is missing; {AGAIN}")
    check_model_folder(folder, "load_model")
    try:
        return (kind or AutoConfig).from_pretrained(folder)
    except UNUSABLE as error:
        raise ValueError(f"load_model: {folder / 'config.json'} cannot be read: {reason_of(error)}") from None


def _model_class(name: str, given: Any, folder: Path) -> Any:
    """The class that the card names: the one of transformers, or the one given."""
    if given is not None and given.__name__ != name:
        raise ValueError(f"load_model: the export is of class {name!r}, not {given.__name__!r}; give that one")
    if given is not None:
        return given
    import transformers

    found = getattr(transformers, name, None)
    if found is None:
        raise ValueError(
            f"load_model: {folder}: transformers {transformers.__version__} has no class {name!r}; upgrade it, or, "
            f"where the class is your own or code from the hub, give it: load_model(folder, model_class={name})"
        )
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        raise ValueError(f"load_model: {folder / CARD} is corrupt (class {name} is no model); {AGAIN}")
    return found


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
