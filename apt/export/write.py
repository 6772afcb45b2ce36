"""A finished model to a folder that others load: merged, shrunk, safetensors and JSON only."""

import copy
import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from apt.export.empty_model import empty_model
from apt.export.files import CARD, ENTRIES, PLAIN, WEIGHTS, WITH_HIDDEN, WITH_PROMPT, WITH_ROW_GATES
from apt.export.merged import merged_state
from apt.export.model_card import README, CardFacts, model_card
from apt.export.remote import remote_class, write_remote_code
from apt.export.renumber import Renumbering
from apt.export.row_gate_files import has_row_gates, save_row_gates
from apt.export.stock import described_class, first_difference, stock_class, stock_config
from apt.export.ties import settle_ties
from apt.families import known_anatomy
from apt.families.hidden_parts import hidden_size
from apt.files.manifest import sha256_of
from apt.files.whole import find_whole, write_folder_aside
from apt.layers import adapted
from apt.methods.prompts import PTuningEmbedding, placed_prompt
from apt.surgery import Summary, bare_model, patch_state, summary
from apt.version import __version__


def export_model(model: nn.Module, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Save a patched model as an ordinary smaller one of transformers: what `apt.export_model` does by default.

    Args:
        model: patched by `apt.patch_model`, a Hugging Face model.
        folder: written under a temporary name, then renamed.
        overwrite: replace a folder that exists.

    Returns:
        The folder.

    Raises:
        ValueError: the model is not patched or still masks units between two events, or the folder exists.
    """
    folder = Path(folder).expanduser()
    model = bare_model(model)
    counts = summary(model)
    if counts.masked:
        raise ValueError(f"export: {counts.masked} units are masked but not removed yet; train past the next event")
    if not overwrite and (found := find_whole(folder)).exists():
        raise ValueError(f"export: {found} exists; give another folder or overwrite=True")
    if (step := patch_state(model).next_event) is not None:
        warnings.warn(
            f"export: an event is still to come, after step {step}: the model is not yet as small as it was to be; in "
            f"a loop of your own call run.after_backward() and run.after_step() at every step",
            stacklevel=2,
        )
    names = Renumbering.of(known_anatomy(model))
    tensors = {names.tensor(name): tensor for name, tensor in merged_state(model).items()}
    counts = _with_sizes(model, counts, tensors)
    config, reason = _config(model, counts, tensors)
    counts = dataclasses.replace(counts, units={names.units(name): count for name, count in counts.units.items()})
    if reason is None and not _is_of_transformers(stock_class(model)):
        reason = f"{stock_class(model).__name__} is no class of transformers"
    config, tensors = settle_ties(model, config, tensors)
    if reason is not None and patch_state(model).config.pruning.layout == "uniform":
        warnings.warn(
            f"export: no stock configuration describes this model, so AutoModel alone cannot load it: {reason}; "
            "apt.load_model can",
            stacklevel=2,
        )
    with write_folder_aside(folder, holds=CARD) as partial:
        generation: Any = getattr(model, "generation_config", None)
        if generation is not None:
            generation.save_pretrained(partial)
        save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
        card = _card(model, counts, partial, config, why_not_stock=reason)
        if reason is not None and _can_be_remote(model, card):
            small = empty_model(stock_class(model), config, card, partial)
            vars(config).update(write_remote_code(partial, small, config))
        config.save_pretrained(partial)
        (partial / CARD).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
        (partial / README).write_text(_readme(model, counts, partial, card), encoding="utf-8")
    return folder


def _is_of_transformers(kind: type[nn.Module]) -> bool:
    """Whether a class is one that AutoModel can find by its name."""
    import transformers

    return getattr(transformers, kind.__name__, None) is kind


def _can_be_remote(model: nn.Module, card: dict[str, Any]) -> bool:
    """Whether a subclass of a class of transformers is the model: it has no prompt, and no gate of the example."""
    return card["format"] in (PLAIN, WITH_HIDDEN) and bool(card["units"]) and _is_of_transformers(stock_class(model))


def _card(model: nn.Module, counts: Summary, folder: Path, config: Any, *, why_not_stock: str | None) -> dict[str, Any]:
    """What `load_model` must know beside the config.

    Args:
        model: that is exported.
        counts: of it.
        folder: holds its weights; gates that cannot be merged are saved beside them.
        config: that is saved.
        why_not_stock: what a stock configuration cannot say; None where one describes the model.
    """
    card: dict[str, Any] = {
        "format": PLAIN,
        "apt_version": __version__,
        "class": described_class(model, config).__name__,
        "stock": why_not_stock is None,
        "why_not_stock": why_not_stock,
        "units": counts.units,
        "head_order": _head_order(model, counts.units),
    }
    if 0 < counts.hidden < int(getattr(config, "hidden_size", 0)):
        card |= {"format": WITH_HIDDEN, "hidden": counts.hidden}
    if has_row_gates(model):
        card |= {"format": WITH_ROW_GATES, "gates": save_row_gates(model, folder)}
    prompt = placed_prompt(model)
    if prompt is not None:
        card |= {"format": WITH_PROMPT, "prompt": _describe(prompt)}
    weights = folder / WEIGHTS
    return card | {
        "sparsity": counts.sparsity,
        "params_before": counts.params_before,
        "params_after": counts.params_after,
        "bytes": weights.stat().st_size,
        "sha256": sha256_of(weights),
    }


def _readme(model: nn.Module, counts: Summary, folder: Path, card: dict[str, Any]) -> str:
    """The model card."""
    config: Any = model.config
    base = str(getattr(config, "_name_or_path", "") or "")
    factors = [linear.factors()[1] for _, linear in adapted(model) if linear.rank]
    trained = not factors or any(bool(b.any()) for b in factors)
    state = patch_state(model)
    method = state.config.method if trained else None
    remote = remote_class(folder)
    return model_card(CardFacts(base, card["class"], method, card["stock"], counts, remote, state.num_repaired))


def _with_sizes(model: nn.Module, counts: Summary, tensors: dict[str, Tensor]) -> Summary:
    """The counts with the sizes of a model that was pruned before it was patched: its config does not say them."""
    anatomy = known_anatomy(model)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    if anatomy is None or counts.units:
        return counts
    if not anatomy.gone and first_difference(stock_class(model), model.config, shapes) is None:
        return counts
    hidden = hidden_size(anatomy.hidden_parts()) if anatomy.has_hidden else 0
    return dataclasses.replace(counts, units=anatomy.num_units(), hidden=hidden)


def _config(model: nn.Module, counts: Summary, tensors: dict[str, Tensor]) -> tuple[Any, str | None]:
    """The config to save, a copy, and what no stock configuration can say of the model, if anything."""
    state = patch_state(model)
    config, reason = _describing_config(model, counts, tensors)
    for name in ENTRIES:  # of the folder that the model came from
        vars(config).pop(name, None)
    if state.use_cache is not None:
        config.use_cache = state.use_cache
    config.architectures = [described_class(model, config).__name__]
    return config, reason


def _describing_config(model: nn.Module, counts: Summary, tensors: dict[str, Tensor]) -> tuple[Any, str | None]:
    """A copy of the config that describes the model, or of its own and what that cannot say."""
    if has_row_gates(model):
        return copy.deepcopy(model.config), "it has gates that depend on the example"
    if counts.virtual_tokens:
        return copy.deepcopy(model.config), "a stock configuration has no virtual tokens"
    anatomy = known_anatomy(model)
    if anatomy is None or not counts.units:
        return copy.deepcopy(model.config), None
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    return stock_config(anatomy, counts.units, shapes, counts.hidden)


def _describe(prompt: nn.Module) -> dict[str, Any]:
    """What `load_model` must know of a prompt beside its numbers."""
    method = "p_tuning" if isinstance(prompt, PTuningEmbedding) else "prefix_tuning"
    return {"method": method, "virtual_tokens": prompt.num_virtual_tokens}


def _head_order(model: nn.Module, units: dict[str, int]) -> dict[str, list[int]]:
    """Which heads of the model as it came are left, by unit group, where the family's attentions must know."""
    anatomy = known_anatomy(model)
    if anatomy is None:
        return {}
    orders = {}
    names = Renumbering.of(anatomy)
    for part in anatomy.attentions:
        order = part.attention.head_order(part.layer.module)
        if order is not None:
            name = names.units(part.name)
            orders[name] = order[: units[name]].tolist()
    return orders
