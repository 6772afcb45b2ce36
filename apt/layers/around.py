"""Puts functions around the call of one module, whoever calls it: ``module(...)`` or ``module.forward(...)``.

Hooks see only the first of the two, and keep what they know of a call in one slot. A function around the call has it in
its own variables.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import nn

from apt.layers.derived import Derived, derive, restore
from apt.process.per_thread import PerThread

Call = Callable[..., Any]


class Wrapper(Protocol):
    """A function around a call."""

    def __call__(self, call: Call, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run ``call(*args, **kwargs)``, with these arguments or others, and return its output or another."""


class _Here(PerThread):
    def __init__(self) -> None:
        self.inside = False  # whether this thread is in a call of the module already


class Around:
    """The functions around the call of one module, the outermost first."""

    def __init__(self) -> None:
        self.wrappers: list[Wrapper] = []
        self._here = _Here()

    def run(self, call: Call, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call through all of them, once: `forward` inside of ``__call__`` is plain."""
        if self._here.inside or not self.wrappers:
            return call(*args, **kwargs)
        for wrapper in reversed(self.wrappers):
            call = functools.partial(wrapper, call, module)
        self._here.inside = True
        try:
            return call(*args, **kwargs)
        finally:
            self._here.inside = False


class _Wrapped(Derived):
    """What the class of a wrapped module puts before its own.

    `forward` may be hidden by one that another library has given the module itself, so both ways in are watched.
    """

    apt_around: Around | None = None  # none in a module that is made of this class by others

    @classmethod
    def members(cls, kind: Any) -> dict[str, Any]:
        @functools.wraps(kind.forward)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            around = self.apt_around
            if around is None:
                return kind.forward(self, *args, **kwargs)
            return around.run(functools.partial(kind.forward, self), self, args, kwargs)

        return {"forward": forward}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inner: Any = super()
        if self.apt_around is None:
            return inner.__call__(*args, **kwargs)
        return self.apt_around.run(inner.__call__, self, args, kwargs)  # type: ignore[arg-type]


class Placed:
    """What takes one wrapper out again, as the handle of a hook does. It holds no module."""

    def __init__(self, around: Around, wrapper: Wrapper) -> None:
        self.around = around
        self.wrapper = wrapper

    def remove(self) -> None:
        """Take the wrapper out; of a second call nothing comes."""
        if self.wrapper in self.around.wrappers:
            self.around.wrappers.remove(self.wrapper)


def wrap(module: nn.Module, wrapper: Wrapper, *, outside: bool = False) -> Placed:
    """Put a wrapper around a module's call, inside those that are there, or outside. Returns its handle."""
    around = around_of(module)
    if around is None:
        around = Around()
        derive(module, _Wrapped)
        module.apt_around = around  # type: ignore[assignment]
    around.wrappers.insert(0 if outside else len(around.wrappers), wrapper)
    return Placed(around, wrapper)


def around_of(module: nn.Module) -> Around | None:
    """What stands around a module's call; None where nothing ever did."""
    return vars(module).get("apt_around")


def unwrap(model: nn.Module) -> None:
    """Give every module of a model around which nothing stands any more the class that it had."""
    for module in model.modules():
        around = around_of(module)
        if around is not None and not around.wrappers:
            del module.apt_around
            restore(module, _Wrapped)


def arguments(module: nn.Module) -> list[str]:
    """The names of what the forward of a module takes, in order."""
    return list(inspect.signature(module.forward).parameters)


def by_name(names: list[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name, however they were given."""
    return {**dict(zip(names, args, strict=False)), **kwargs}
