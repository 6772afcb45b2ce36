"""A word where a model is saved in a way that would not bring it back: `save_pretrained` of what has parts of ours."""

import re
import warnings
from pathlib import Path
from typing import Any

from torch import nn

from apt.families.own_method import OwnMethod

SAVE = "save_pretrained"
CHECKPOINT = re.compile(r"checkpoint-\d+|checkpoint\.partial")  # of a Trainer, which reads it into the same model


def _save(model: Any, text: str, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
    """Save as the class of the model does, which a Trainer, a hub and others call too, after a warning.

    Raises:
        ValueError: the model was in no variable, so that it is gone.
    """
    if model is None:
        raise ValueError(f"{text}; nothing was saved, as the model is in no variable")
    if not any(CHECKPOINT.fullmatch(part) for part in Path(save_directory).parts[-2:]):
        warnings.warn(text, stacklevel=3)
    return type(model).save_pretrained(model, save_directory, *args, **kwargs)


def place_notice(model: Any, text: str) -> None:
    """Let the `save_pretrained` of a model say a text first; a model without one is left alone.

    It stands on the model itself, as one that is loaded or unpatched keeps its stock class.
    """
    if hasattr(type(model), SAVE):
        model.save_pretrained = OwnMethod(model, _save, text)


def saver_of(model: nn.Module) -> OwnMethod | None:
    """The `save_pretrained` of ours that a model has: with a notice, or with its code; None where it has none."""
    own = vars(model).get(SAVE)
    return own if isinstance(own, OwnMethod) else None


def remove_saver(model: nn.Module) -> None:
    """Give a model its own `save_pretrained` back."""
    if saver_of(model) is not None:
        delattr(model, SAVE)
