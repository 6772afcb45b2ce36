"""A finished model to a folder that others load, and back: merged, shrunk, safetensors and JSON only."""

import copy
import dataclasses
import hashlib
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from apt import __version__
from apt.controller import patch_state, uncompiled
from apt.dimensions import has_dimensions, hidden_group, live_views, resize_dimensions
from apt.distiller import TRANSFORM
from apt.families import Attention, Family, find_family
from apt.families.hidden import hidden_parts, hidden_size
from apt.fused import FusedLinears, plain_linear, replace_module, replaced, restore_plain, split_fused
from apt.gate_files import has_gates, load_gates, save_gates
from apt.linears import features, is_conv1d, make_linear, weight_and_bias
from apt.methods import GATES, METHODS
from apt.model_card import README, CardFacts, model_card
from apt.patch import Summary, summary
from apt.prompts import PROMPT, PTuningEmbedding, place_plain_prompt, placed_prompt
from apt.stock import first_difference, stock_config
from apt.units import num_units, part_linears, present_units

FORMAT = (
    4  # of apt_export.json: 2 has hidden dimensions, 3 gates, 4 a prompt; a reader refuses what is newer than itself
)
CARD, WEIGHTS = "apt_export.json", "model.safetensors"


def export_model(model: nn.Module, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Save a patched model as an ordinary smaller one: adapters merged in float32, pruned units gone.

    The folder holds ``config.json``, ``model.safetensors`` under the stock parameter names, and ``apt_export.json``
    with the number of units in every group and of hidden dimensions, which `load_model` reads, and ``README.md``, a
    model card. Where a stock configuration
    describes the result ("stock" in that file), as with ``layout="uniform"``, it is the one that is saved, and
    ``AutoModel`` loads the folder too. Gates that depend on the example (method "dynacsg") cannot be merged: they lie
    beside the weights, and `load_model` puts them back. A prompt is kept without the network that makes it, and
    `load_model` puts it to work. The model in memory is not changed.

    Args:
        model: patched by `apt.patch_model`, a Hugging Face model.
        folder: written under a temporary name, then renamed.
        overwrite: replace a folder that exists.

    Returns:
        The folder.

    Raises:
        ValueError: the model is not patched or still masks units between two events, or the folder exists.
    """
    folder, model = Path(folder), uncompiled(model)
    state, counts = patch_state(model), summary(model)
    if counts.masked:
        raise ValueError(f"export: {counts.masked} units are masked but not removed yet; train past the next event")
    if folder.exists() and not overwrite:
        raise ValueError(f"export: {folder} exists; give another folder or overwrite=True")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)

    tensors = merged_state(model)
    counts = _with_sizes(model, counts, tensors)
    config, reason = _config(model, counts, tensors)
    if reason is not None and state.config.pruning.layout == "uniform":
        warnings.warn(
            f"export: no stock configuration describes this model, so AutoModel cannot load it: {reason}; "
            "apt.load_model can",
            stacklevel=2,
        )
    if state.use_cache is not None:
        config.use_cache = state.use_cache
    config.architectures = [type(model).__name__]
    config.save_pretrained(partial)
    generation: Any = getattr(model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(partial)
    save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
    gates, prompt = save_gates(model, partial) if has_gates(model) else None, placed_prompt(model)
    narrower = 0 < counts.hidden < int(getattr(config, "hidden_size", 0))  # than the saved config says
    card = {
        "format": 4 if prompt is not None else 3 if gates is not None else 2 if narrower else 1,
        "apt_version": __version__,
        "class": type(model).__name__,
        "stock": reason is None,
        "why_not_stock": reason,
        "units": counts.units,
        "head_order": _head_order(model, counts.units),
        **({"hidden": counts.hidden} if narrower else {}),
        **({} if gates is None else {"gates": gates}),
        **({} if prompt is None else {"prompt": _describe(prompt)}),
        "sparsity": counts.sparsity,
        "params_before": counts.params_before,
        "params_after": counts.params_after,
        "bytes": (partial / WEIGHTS).stat().st_size,
        "sha256": _sha256(partial / WEIGHTS),
    }
    (partial / CARD).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    base: Any = getattr(model.config, "_name_or_path", "")
    facts = CardFacts(str(base or ""), type(model).__name__, state.config.method, reason is None, counts)
    (partial / README).write_text(model_card(facts), encoding="utf-8")
    if folder.exists():
        shutil.rmtree(folder)
    os.rename(partial, folder)
    return folder


def _with_sizes(model: nn.Module, counts: Summary, tensors: dict[str, Tensor]) -> Summary:
    """The counts with the sizes of a model that was pruned before it was patched: its config does not say them."""
    family = patch_state(model).family
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    if family is None or counts.units or first_difference(type(model), model.config, shapes) is None:
        return counts
    hidden = hidden_size(hidden_parts(model, family)) if has_dimensions(model, family) else 0
    return dataclasses.replace(counts, units=present_units(model, family), hidden=hidden)


def _config(model: nn.Module, counts: Summary, tensors: dict[str, Tensor]) -> tuple[Any, str | None]:
    """A copy of the config that describes the model, or of its own and what that cannot say."""
    state = patch_state(model)
    if has_gates(model):
        return copy.deepcopy(model.config), "it has gates that depend on the example"
    if counts.virtual_tokens:
        return copy.deepcopy(model.config), "a stock configuration has no virtual tokens"
    if state.family is None or not counts.units:
        return copy.deepcopy(model.config), None
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    return stock_config(model, state.family, counts.units, shapes, counts.hidden)


def load_model(folder: str | Path) -> nn.Module:
    """Load an export as a plain model of its stock class, in evaluation mode, with the layer sizes it was saved with.

    A model with gates that depend on the example comes patched, as it was trained.

    Args:
        folder: as `export_model` wrote it.

    Returns:
        The model, on the CPU.

    Raises:
        ValueError: the folder is not an export, a file is truncated or corrupt, or a newer version made it.
    """
    folder = Path(folder)
    card = _read_card(folder)
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"load_model: {folder / 'config.json'} cannot be read: {str(error).splitlines()[0]}") from None
    state = _read_weights(folder, card)
    with init_empty_weights(include_buffers=False):
        model = _model_class(card["class"])(config)
        if card["units"]:
            _resize(model, find_family(model), card)
        if card.get("prompt") is not None:
            place_plain_prompt(model, find_family(model), *_prompt_of(card["prompt"]))
    try:
        unexpected = model.load_state_dict(state, strict=False, assign=True).unexpected_keys
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(f"load_model: {folder / WEIGHTS} does not fit the model: {reason}") from None
    model.tie_weights()
    absent = [name for name, tensor in model.named_parameters() if tensor.is_meta]
    if absent or unexpected:
        raise ValueError(
            f"load_model: {folder / WEIGHTS} does not fit the model: {(absent + list(unexpected))[0]} is off"
        )
    plain: nn.Module = model.eval().requires_grad_(True)
    if card.get("gates") is not None:
        load_gates(plain, folder, card["gates"])
    return plain


def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """Stock names to tensors of their dtypes before the patch: adapters merged, views cloned, a tied tensor once."""
    ours, done, dtypes = dict(replaced(model)), set(), patch_state(model).dtypes
    merge = not has_gates(model)
    group = hidden_group(model, patch_state(model).family)
    live = {id(stored): view for stored, view in live_views(model, group)}
    state: dict[str, Tensor] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        parent, _, leaf = name.rpartition(".")
        if parent == TRANSFORM or name.startswith((f"{GATES}.", f"{PROMPT}.")):
            continue  # it served training alone, has its own file, or comes below
            continue
        place = parent  # a part of a fused projection lies deeper, and so does what an adapter is made from
        while place and place not in ours:
            place = place.rpartition(".")[0]
        linear = ours.get(place)
        if isinstance(linear, FusedLinears):
            if place not in done:
                done.add(place)
                plain = plain_linear(linear, merge=merge).state_dict()
                state.update({f"{place}.{part}": _copy(value) for part, value in plain.items()})
            continue
        if linear is not None and (place != parent or leaf not in ("weight", "bias")):
            continue
        if linear is None or not linear.rank:  # what has an adapter is tied no more
            if tensor.numel() and tensor.data_ptr() in seen:
                continue
            seen.add(tensor.data_ptr())
        if linear is not None and leaf == "weight":
            tensor = plain_linear(linear, merge=merge).get_parameter("weight")
        elif name in parameters:
            tensor = live.get(id(parameters[name]), tensor)
        state[name] = _copy(tensor.to(dtypes.get(name, tensor.dtype)))
    prompt = placed_prompt(model)
    if prompt is not None:
        state.update({f"{PROMPT}.{name}": _copy(tensor) for name, tensor in prompt.plain().state_dict().items()})
    return state


def _describe(prompt: nn.Module) -> dict[str, Any]:
    """What `load_model` must know of a prompt beside its numbers."""
    method = "p_tuning" if isinstance(prompt, PTuningEmbedding) else "prefix_tuning"
    return {"method": method, "virtual_tokens": prompt.num_virtual_tokens}


def _prompt_of(entry: Any) -> tuple[str, int]:
    """Method and virtual tokens of what `_describe` wrote."""
    method, count = (entry.get(name) for name in ("method", "virtual_tokens")) if isinstance(entry, dict) else (None, 0)
    if method not in METHODS or not METHODS[method].prompt or not isinstance(count, int) or count < 1:
        raise ValueError(f"load_model: {CARD} is corrupt (prompt is off); export the model again")
    return method, count


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _read_card(folder: Path) -> dict[str, Any]:
    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"load_model: {folder} is not an export of apt; it has no {CARD}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"load_model: {folder / CARD} is corrupt ({error}); export the model again") from None
    if not isinstance(card, dict) or not isinstance(card.get("format"), int):
        raise ValueError(f"load_model: {folder / CARD} is corrupt (no format number); export the model again")
    if card["format"] <= FORMAT and any(card.get(key) is None for key in ("class", "units", "bytes", "sha256")):
        raise ValueError(f"load_model: {folder / CARD} is corrupt (an entry is missing); export the model again")
    if card["format"] > FORMAT:
        raise ValueError(
            f"load_model: {folder} has format {card['format']}, written by apt-lm {card.get('apt_version')}; this "
            f"version reads up to {FORMAT}; upgrade apt-lm"
        )
    return card


def _read_weights(folder: Path, card: dict[str, Any]) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.exists():
        raise ValueError(f"load_model: {path} is missing; export the model again")
    size = path.stat().st_size
    if size != card["bytes"]:
        raise ValueError(
            f"load_model: {path} has {size} of {card['bytes']} bytes; it is truncated, copy or export it again"
        )
    if _sha256(path) != card["sha256"]:
        raise ValueError(f"load_model: {path} is corrupt (its checksum differs); copy or export it again")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"load_model: {path} is corrupt ({error}); export the model again") from None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:
    """`hashlib.file_digest` of Python 3.11, for 3.10."""
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def _model_class(name: str) -> Any:
    import transformers

    found = getattr(transformers, name, None)
    if found is None:
        raise ValueError(f"load_model: transformers {transformers.__version__} has no class {name!r}; upgrade it")
    return found


def _head_order(model: nn.Module, units: dict[str, int]) -> dict[str, list[int]]:
    """Which heads of the model as it came are left, by unit group, where the family's attentions must know."""
    family, orders = patch_state(model).family, {}
    for layer in [] if family is None else family.layers(model):
        for part in layer.stack.parts:
            order = part.head_order(layer.module) if isinstance(part, Attention) else None
            if order is not None:
                name = f"{layer.name}.{part.units}"
                orders[name] = order[: units[name]].tolist()
    return orders


def _resize(model: nn.Module, family: Family, card: dict[str, Any]) -> None:
    """Give the linears of an empty model the sizes of an export; the weights follow."""
    units, orders, hidden = card["units"], card.get("head_order", {}), card.get("hidden")
    parts = {f"{layer.name}.{p.units}": (layer, p) for layer in family.layers(model) for p in layer.stack.parts}
    if units.keys() != parts.keys():
        raise ValueError(f"load_model: {CARD} is corrupt (it lists {len(units)} unit groups); export the model again")
    split_fused(model, family)
    if hidden is not None:
        resize_dimensions(model, family, hidden)
    for name, (layer, part) in parts.items():
        linears, before = part_linears(layer, part), num_units(layer, part)
        for role in part.producers:
            if role in linears:
                _set_size(layer.module, part.linears[role], out=features(linears[role])[0] // before * units[name])
        into = features(linears[part.reader])[1] // before * units[name]
        _set_size(layer.module, part.linears[part.reader], into=into)
        if isinstance(part, Attention):
            order = torch.tensor(orders[name]) if name in orders else None
            lacks = order is None and part.follow is not None and 0 < units[name] < before
            if lacks or (order is not None and order.shape != (units[name],)):
                raise ValueError(f"load_model: {CARD} is corrupt (head_order of {name} is off); export the model again")
            part.set_heads(layer.module, before, units[name], order)
            if units[name] == 0:
                part.remove(layer.module)
    restore_plain(model, merge=False)


def _set_size(layer: nn.Module, name: str, *, out: int | None = None, into: int | None = None) -> None:
    """Put a linear of that kind, with another number of outputs or inputs and no numbers yet, in the place of one."""
    linear = layer.get_submodule(name)
    (weight, bias), conv1d = weight_and_bias(linear), is_conv1d(linear)
    out, into = weight.shape[0] if out is None else out, weight.shape[1] if into is None else into
    empty_bias = None if bias is None else bias.new_empty(out, device="meta")
    replace_module(layer, name, make_linear(weight.new_empty(out, into, device="meta"), empty_bias, conv1d=conv1d))
