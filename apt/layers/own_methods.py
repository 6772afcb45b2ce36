"""Functions of ours around methods of one model: they stand in its class, so that a model in no variable has them too.

On the model itself they would have to hold it. Strongly, that is a cycle; weakly, ``load_model(folder).generate(...)``
has lost its model before the call.
"""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from torch import nn

from apt.layers.derived import Derived, derive, restore

NAMES = ("generate", "resize_token_embeddings")  # methods that may have one
Own = tuple[Callable[..., Any], tuple[Any, ...]]  # a function of ours, and what it is given first


class _Owning(Derived):
    apt_methods: Mapping[str, Own] = MappingProxyType({})

    @classmethod
    def members(cls, kind: Any) -> dict[str, Any]:
        return {name: _method(getattr(kind, name), name) for name in NAMES if hasattr(kind, name)}


def _method(plain: Callable[..., Any], name: str) -> Callable[..., Any]:
    @functools.wraps(plain)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = functools.partial(plain, self)
        if name not in self.apt_methods:
            return call(*args, **kwargs)
        function, given = self.apt_methods[name]
        return function(self, call, *given, *args, **kwargs)

    return method


def put_method(model: nn.Module, name: str, function: Callable[..., Any], *given: Any) -> None:
    """Let a method of a model, where its class has it, be ``function(model, method, *given, ...)``.

    Args:
        model: of which copies and pickles have the function too.
        name: one of `NAMES`.
        function: one of a module, so that it can be pickled.
        given: what it is called with before the arguments of a caller.
    """
    if not hasattr(type(model), name):
        return
    known = vars(model).get("apt_methods")
    if known is None:
        derive(model, _Owning)
    model.apt_methods = {**(known or {}), name: (function, given)}  # type: ignore[assignment]


def given_to(model: nn.Module, name: str) -> tuple[Any, ...] | None:
    """What `put_method` was given for a method; None where it is the model's own."""
    known: Mapping[str, Own] = vars(model).get("apt_methods", {})
    return known[name][1] if name in known else None


def take_method(model: nn.Module, name: str) -> None:
    """Give a model its own method back; without any of ours it has its class again."""
    known: dict[str, Own] | None = vars(model).get("apt_methods")
    if known is None:
        return
    known.pop(name, None)
    if not known:
        del model.apt_methods
        restore(model, _Owning)
