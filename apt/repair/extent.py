"""Passes that end behind the last module that is listened to: nobody asks what the head and the loss would be."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn


class _EnoughError(Exception):
    """All calls that are listened to have been made."""


class Extent:
    """Runs passes no further than some modules are called. The first runs whole, and tells how many calls there are.

    So a loss that runs the model several times is heard to its last run. In a compiled graph all passes run whole.

    Args:
        modules: that are listened to.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = list(modules)
        self.calls: int | None = None  # of a whole pass

    @contextmanager
    def one_pass(self) -> Iterator[None]:
        """One pass inside."""
        seen = 0

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            nonlocal seen
            if torch.compiler.is_compiling():
                return
            seen += 1
            if seen == self.calls:
                raise _EnoughError

        with ExitStack() as stack:
            for module in self.modules:
                stack.callback(module.register_forward_hook(hook).remove)
            try:
                yield
            except _EnoughError:
                return
        if self.calls is None:
            self.calls = seen
