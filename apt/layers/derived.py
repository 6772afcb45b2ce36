"""A class of its own for one module, derived from the class that it had: it stands around the whole call."""

import functools
from typing import Any, ClassVar

from torch import nn


class Derived:
    """Base of what such a class puts before the module's own.

    Name and module of the class stay, so that whoever knows a class by them finds it. A module of such a class can be
    copied and pickled: what is stored is how to make its class again.
    """

    apt_origin: ClassVar[tuple[Any, Any]]  # what was put before which class; of derived classes alone

    @classmethod
    def members(cls, kind: Any) -> dict[str, Any]:
        """What else a class derived from `kind` holds."""
        return {}

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        chain = _chain(type(self))
        return (_blank, chain, *reduced[2:]) if len(chain) > 1 else reduced


def derive(module: nn.Module, base: Any) -> None:
    """Put `base`, a class below `Derived`, before the class of a module."""
    kind: Any = type(module)
    module.__class__ = _derived(base, kind)


def restore(module: nn.Module, base: type[Derived]) -> None:
    """Take what `derive` has put before the class of a module out. One that others have derived since keeps theirs."""
    kind, *bases = _chain(type(module))
    if base in bases:
        bases.remove(base)
        module.__class__ = functools.reduce(lambda kind, other: _derived(other, kind), bases, kind)


def plain_class(module: nn.Module) -> Any:
    """The class of a module before anything was derived from it."""
    return _chain(type(module))[0]


@functools.cache
def _derived(base: Any, kind: Any) -> Any:
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "apt_origin": (base, kind)}
    return type(kind.__name__, (base, kind), names | base.members(kind))


def _chain(kind: Any) -> tuple[Any, ...]:
    """The class before anything was derived from it, then what was put before it, in that order."""
    bases: list[Any] = []
    while "apt_origin" in vars(kind):
        base, kind = vars(kind)["apt_origin"]
        bases.insert(0, base)
    return kind, *bases


def _blank(kind: Any, *bases: Any) -> Any:
    """A module without any state, whose class is made anew."""
    for base in bases:
        kind = _derived(base, kind)
    return kind.__new__(kind)
