"""An export back into a plain model of its stock class, with the sizes it was saved with."""

from pathlib import Path
from typing import Any

from torch import nn

from apt.export.empty_model import empty_model
from apt.export.files import AGAIN, CARD, ENTRIES, WEIGHTS, read_card, read_weights
from apt.export.row_gate_files import load_row_gates
from apt.export.ties import tie_what_is_equal
from apt.families.config_files import UNUSABLE, check_model_folder, reason_of, state_reason_of
from apt.files.whole import find_whole
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
    kind = _model_class(card["class"], model_class, folder)
    config = _read_config(folder, None if model_class is None else getattr(kind, "config_class", None))
    state = read_weights(folder, card)
    model = empty_model(kind, config, card, folder)
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
        config = (kind or AutoConfig).from_pretrained(folder)
    except UNUSABLE as error:
        raise ValueError(f"load_model: {folder / 'config.json'} cannot be read: {reason_of(error)}") from None
    for name in ENTRIES:
        vars(config).pop(name, None)
    return config


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
