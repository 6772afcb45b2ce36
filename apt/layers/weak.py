"""Modules that another object knows without keeping them alive."""

import copy
import weakref
from collections.abc import Iterable
from typing import Any

from torch import nn


class WeakModules:
    """Modules of one model, held weakly: what hangs on some of them may know the others without a cycle.

    A cycle would let a model that nobody has any more wait for the garbage collector, with all its memory.

    Args:
        modules: something else keeps them alive, as the model does of which they are.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._references = [weakref.ref(module) for module in modules]

    def alive(self) -> list[Any]:
        """Those that are there still, in their order."""
        found = [reference() for reference in self._references]
        return [module for module in found if module is not None]

    def __len__(self) -> int:
        """How many there were."""
        return len(self._references)

    def __deepcopy__(self, memo: dict[int, Any]) -> "WeakModules":
        """Those of the copy, where a model is copied with them."""
        return WeakModules([copy.deepcopy(module, memo) for module in self.alive()])

    def __reduce__(self) -> tuple[Any, ...]:
        return WeakModules, (self.alive(),)
