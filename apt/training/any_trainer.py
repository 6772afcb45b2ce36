"""Pruning for every trainer that is built on `transformers.Trainer`: which class, and whose argument is whose."""

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

from transformers import Trainer

_MADE: dict[tuple[type, type], type] = {}  # classes of both, by the two
MANY = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def arguments_by_name(kind: type, ours: type, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a trainer by name; those without one are named as the class that comes after `ours` has them.

    Args:
        kind: the class of the trainer.
        ours: the class in its method resolution order that takes the arguments.
        args: without a name.
        kwargs: with one.

    Raises:
        TypeError: there are more of them than that class takes, or one is given twice.
    """
    order = kind.__mro__
    names = next(found for cls in order[order.index(ours) + 1 :] if (found := list(_own_arguments(cls))))
    named = dict(zip(names, args, strict=False))
    if len(args) > len(names) or named.keys() & kwargs.keys():
        raise TypeError(f"{kind.__name__} takes {', '.join(names)}; give them by name, each once")
    return named | kwargs


def known_arguments(kind: type) -> set[str]:
    """The names of all arguments that a class and its bases take."""
    return {name for cls in kind.__mro__ for name in _own_arguments(cls)}


def _own_arguments(cls: type) -> Iterator[str]:
    """The names that the ``__init__`` of a class itself takes, in their order."""
    if "__init__" in vars(cls) and cls is not object:
        parameters = list(inspect.signature(vars(cls)["__init__"]).parameters.values())
        yield from (each.name for each in parameters[1:] if each.kind not in MANY)


def beside(ours: Any, trainer: Any) -> Any:
    """A class of both, that of ours before the other's; the same one at every call.

    Raises:
        ValueError: the other is no class of a Trainer.
    """
    if not (isinstance(trainer, type) and issubclass(trainer, Trainer)):
        raise ValueError(f"trainer_class: takes a subclass of transformers.Trainer, got {trainer!r}")
    if issubclass(trainer, ours):
        return trainer
    if issubclass(ours, trainer):
        return ours
    text = f"`{trainer.__name__}` that prunes the model it trains; takes the arguments of both, see `apt.APTrainer`."
    if (ours, trainer) not in _MADE:
        _MADE[ours, trainer] = type(
            f"APT{trainer.__name__}", (ours, trainer), {"__doc__": text, "__module__": __name__}
        )
    return _MADE[ours, trainer]
