"""An export back into a plain model of its stock class, with the sizes it was saved with."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apt.export.empty_model import empty_model
from apt.export.files import AGAIN, CARD, ENTRIES, WEIGHTS, read_card, read_weights
from apt.export.remote import CODE, remote_class
from apt.export.remote_model import OwnSizes
from apt.export.row_gate_files import load_row_gates
from apt.export.saved_again import save_with_code
from apt.export.ties import tie_what_is_equal
from apt.families.config_files import UNUSABLE, check_model_folder, reason_of, state_reason_of
from apt.files.reading import read_json_table
from apt.files.whole import find_whole
from apt.surgery.save_notice import place_notice

NOTICE = (
    "apt: no configuration of transformers can say the sizes of this model, so save_pretrained writes what nobody can "
    "read; save it with apt.export_model(apt.patch_model(model, method='lora'), folder)"
)
SPREADS = ("auto", "balanced", "balanced_low_0", "sequential")  # of accelerate


def load_model(
    folder: str | Path,
    *,
    model_class: Any = None,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
) -> nn.Module:
    """Load an export as a plain model of its stock class, in evaluation mode, with the layer sizes it was saved with.

    A model with gates that depend on the example comes patched, as it was trained. `save_pretrained` of what this gave
    writes a folder that this, and `AutoModel` with `trust_remote_code`, read again.

    Args:
        folder: as `export_model` wrote it; ``~`` is the home folder. Or the name of an export on the hub.
        model_class: of a model that is none of transformers': a class of your own, or of code from the hub. It is the
            one that was exported; its ``config_class`` reads the config.
        dtype: of all floating-point weights, "bfloat16" or a torch one; None, or "auto", is that of the file.
        device_map: a device, or what accelerate's `dispatch_model` takes, "auto" among it; None is the CPU.

    Returns:
        The model.

    Raises:
        ValueError: the folder is not an export, a file is truncated or corrupt, a newer version made it, it is of
            another class, or the hub gives nothing of that name.
    """
    place = local_folder(folder)
    model = _load_saved_again(place) if _is_saved_again(place) else _load_export(place, model_class)
    if (chosen := _dtype_of(dtype)) is not None:
        model = model.to(chosen)
    return model if device_map is None else _placed(model, device_map)


def _load_export(folder: Path, model_class: Any) -> nn.Module:
    card = read_card(folder)
    kind = _model_class(card["class"], model_class, folder)
    config = _read_config(folder, None if model_class is None else getattr(kind, "config_class", None))
    state = read_weights(folder, card)
    model = empty_model(kind, config, card, folder)
    _fill(model, state, folder)
    plain: nn.Module = model.eval().requires_grad_(True)
    if not card.get("stock", True):
        if remote_class(folder) is None:
            place_notice(plain, NOTICE)
        else:
            save_with_code(plain)
    if card.get("gates") is not None:
        load_row_gates(plain, folder, card["gates"])
    return plain


def _fill(model: nn.Module, state: dict[str, Tensor], folder: Path) -> None:
    """Give an empty model its numbers. Raises ValueError where they are not its."""
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


def _is_saved_again(folder: Path) -> bool:
    """Whether a folder is what `save_pretrained` wrote of such a model: it has the code, and no card of ours."""
    return not (folder / CARD).exists() and (folder / CODE).exists() and remote_class(folder) is not None


def _load_saved_again(folder: Path) -> nn.Module:
    """By transformers, with the sizes that the config says; the code that runs is ours, not the folder's."""
    check_model_folder(folder, "load_model")
    config = read_json_table(folder / "config.json", "load_model")
    kind = _model_class(str((config.get("architectures") or [""])[0]).removeprefix("Apt"), None, folder)
    sized = type(f"Apt{kind.__name__}", (OwnSizes, kind), {})
    try:
        model: Any = sized.from_pretrained(folder, dtype="auto")  # type: ignore[attr-defined]
    except UNUSABLE as error:
        raise ValueError(f"load_model: {folder} cannot be loaded: {reason_of(error)}") from None
    model.__class__ = kind
    for name in ENTRIES:
        vars(model.config).pop(name, None)
    save_with_code(model)
    plain: nn.Module = model.eval()
    return plain


def local_folder(given: str | Path) -> Path:
    """The folder of a name: it lies here, or is fetched from the hub.

    Raises:
        ValueError: it is neither.
    """
    folder = find_whole(Path(given).expanduser())
    if folder.exists() or _looks_local(given):
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(given), allow_patterns=["*.json", "*.safetensors", "*.py"]))
    except (OSError, ValueError) as error:  # its own errors are OSErrors
        told = " ".join(str(error).split())
        raise ValueError(f"load_model: there is no folder {given}, and the hub gives none: {told}") from None


def _dtype_of(given: Any) -> torch.dtype | None:
    if given in (None, "auto"):
        return None
    found = getattr(torch, given, None) if isinstance(given, str) else given
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"load_model: dtype is a floating-point type of torch, got {given!r}")
    return found


def _placed(model: Any, device_map: Any) -> nn.Module:
    """The model on a device, or spread over several by accelerate."""
    if isinstance(device_map, int | torch.device) or (isinstance(device_map, str) and device_map not in SPREADS):
        moved: nn.Module = model.to(device_map)
        return moved
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    if isinstance(device_map, str):
        whole = list(getattr(model, "_no_split_modules", None) or [])
        memory = get_balanced_memory(model, no_split_module_classes=whole) if device_map != "sequential" else None
        device_map = infer_auto_device_map(model, max_memory=memory, no_split_module_classes=whole)
    spread: nn.Module = dispatch_model(model, device_map)
    return spread


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
