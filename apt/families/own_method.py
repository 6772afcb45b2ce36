"""A function of ours in the place of a method of one module, whose class stays."""

import copy
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn


class OwnMethod:
    """Calls ``function(model, *given, ...)`` where a method of that name would be called.

    It hangs on the module and holds it weakly, so that the last reference to its model frees both. Called on what is in
    no variable, as in ``load(...).method()``, it finds None in its place.

    Args:
        model: that module.
        function: in the place of the method; one of a module, so that it can be pickled.
        given: what it is called with before the arguments of a caller.
    """

    def __init__(self, model: nn.Module, function: Callable[..., Any], *given: Any) -> None:
        self._model = weakref.ref(model)
        self.function = function
        self.given = given

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self._model(), *self.given, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "OwnMethod":
        """The method of the copy, where a model is copied with it."""
        model: Any = self._model()
        return OwnMethod(memo.get(id(model), model), self.function, *copy.deepcopy(self.given, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return OwnMethod, (self._model(), self.function, *self.given)
