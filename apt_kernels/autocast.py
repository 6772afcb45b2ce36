"""Where autocast acts: on x and weight of the linear ops, as they say, and on nothing beneath any op.

A matrix product under autocast undoes the cast to float32 before it, so a sum that is written as a product would be
taken in half precision.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])


def cast_for_product(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """Input and weights of a linear op in the dtype of autocast, which leaves float64 alone; as they are without it."""
    kind = x.device.type
    if not _is_on(kind):
        return x, *weights
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in (x, *weights))


def outside_autocast(function: Function) -> Function:
    """Compute in the dtypes that are given, whether autocast is on or not. The first tensor says on what device."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        kind = _first_tensor(args).device.type
        if not _is_on(kind):
            return function(*args, **kwargs)
        with torch.autocast(kind, enabled=False):
            return function(*args, **kwargs)

    return wrapped  # type: ignore[return-value]


def _is_on(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)  # the meta device has none


def _first_tensor(args: tuple[Any, ...]) -> Tensor:
    for arg in args:
        if isinstance(arg, Tensor):
            return arg
    raise TypeError("outside_autocast: no positional argument is a tensor")
