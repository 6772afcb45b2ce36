"""What `load_model` gave, saved by `save_pretrained`: with its code, so that it is read as the export was."""

from pathlib import Path
from typing import Any

from apt.export.files import ENTRIES
from apt.export.remote import write_remote_code
from apt.families.own_method import OwnMethod
from apt.surgery.save_notice import SAVE


def _save(model: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
    """Save as the class of the model does, with the code and its entries in the config.

    Raises:
        ValueError: the model was in no variable, so that it is gone.
    """
    if model is None:
        raise ValueError("save_pretrained: the model is in no variable, so it is gone; nothing was saved")
    folder = Path(save_directory)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        vars(model.config).update(write_remote_code(folder, model, model.config))  # before files go to a hub
        return type(model).save_pretrained(model, save_directory, *args, **kwargs)
    finally:
        for name in ENTRIES:
            vars(model.config).pop(name, None)


def save_with_code(model: Any) -> None:
    """Let the `save_pretrained` of a plain model, whose layers differ in size, write what others can read."""
    setattr(model, SAVE, OwnMethod(model, _save))
