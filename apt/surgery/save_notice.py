"""A word where a model is saved in a way that would not bring it back: `save_pretrained` of what has parts of ours."""

import re
import warnings
import weakref
from pathlib import Path
from typing import Any

from torch import nn

SAVE = "save_pretrained"
CHECKPOINT = re.compile(r"checkpoint-\d+|checkpoint\.partial")  # of a Trainer, which reads it into the same model


class SaveNotice:
    """A model's own `save_pretrained`, which a Trainer, a hub and sentence-transformers call too, after a warning.

    It hangs on the model and holds it weakly, so that the last reference of a user frees the model.

    Args:
        model: whose files would not be whole.
        text: says why, and what to do.
    """

    def __init__(self, model: nn.Module, text: str) -> None:
        self._model = weakref.ref(model)
        self.text = text

    def __call__(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        model: Any = self._model()
        if not any(CHECKPOINT.fullmatch(part) for part in Path(save_directory).parts[-2:]):
            warnings.warn(self.text, stacklevel=2)
        return type(model).save_pretrained(model, save_directory, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "SaveNotice":
        """The notice of the copy, where a model is copied with it."""
        model: Any = self._model()
        return SaveNotice(memo.get(id(model), model), self.text)

    def __reduce__(self) -> tuple[Any, ...]:
        return SaveNotice, (self._model(), self.text)


def place_notice(model: Any, text: str) -> None:
    """Let the `save_pretrained` of a model say a text first; a model without one is left alone."""
    if hasattr(type(model), SAVE):
        model.save_pretrained = SaveNotice(model, text)


def remove_notice(model: nn.Module) -> None:
    """Give a model its own `save_pretrained` back, where it has a notice."""
    if isinstance(vars(model).get(SAVE), SaveNotice):
        delattr(model, SAVE)
