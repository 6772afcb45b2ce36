"""Which layers are compared, and how their outputs are caught."""

import functools
import itertools
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def sample_layers(num_layers: int, num_blocks: int, generator: torch.Generator) -> list[int]:
    """One random layer of each of `num_blocks` blocks of neighbours, as even as can be; of fewer layers all."""
    blocks = min(num_blocks, num_layers)
    edges = [block * num_layers // blocks for block in range(blocks + 1)]
    return [low + int(torch.randint(high - low, (1,), generator=generator)) for low, high in itertools.pairwise(edges)]


def matching_layers(layer: int, alive: Collection[int], mapping: str) -> list[int]:
    """Layers of the student that may learn from a layer of the teacher; the one with the smaller error then does.

    "nearest": the layer itself while it is alive, else the nearest alive one below and above. "cofi": any that is
    alive. Where none is, the layer itself.

    Args:
        layer: of the teacher.
        alive: layers of the student that still have a head and a neuron.
        mapping: one of `MAPPINGS`.
    """
    if mapping == "nearest" and layer in alive:
        return [layer]
    found = sorted(alive)
    if mapping == "nearest":
        found = [i for i in found if i < layer][-1:] + [i for i in found if i > layer][:1]
    return found or [layer]


class Taps:
    """Catches the outputs of chosen layers. It keeps them for one pass.

    Each layer gets a class of its own, derived from what it was, whose call hands on the output: outside everything the
    layer itself does, and so outside a region that is recomputed for gradient checkpointing, where a forward hook would
    stand inside in some versions of transformers.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.layers = list(layers)
        self.listening = False
        self.wanted: frozenset[int] = frozenset()
        self.seen: dict[int, Tensor] = {}
        self.autocast: tuple[bool, torch.dtype] | None = None  # of the pass that was caught
        self._of_teacher = False
        self._catch: Any = self._note
        if "torch._dynamo" in sys.modules:  # what is wanted changes with every batch, which no graph should hold
            self._catch = torch._dynamo.disable(self._note)
        for index, layer in enumerate(self.layers):
            untap(layer)
            kind: Any = type(layer)
            layer.__class__ = _tapped(kind)
            layer.apt_tap = (self, index)  # type: ignore[assignment]

    def catch(self, index: int, output: Any) -> None:
        if self.listening and (self._of_teacher or torch.is_grad_enabled()):
            self._catch(index, output)

    def _note(self, index: int, output: Any) -> None:
        if index not in self.wanted:
            return
        hidden = output[0] if isinstance(output, tuple) else output
        self.seen[index] = hidden
        kind = hidden.device.type
        self.autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

    @contextmanager
    def of_teacher(self, wanted: Collection[int]) -> Iterator[dict[int, Tensor]]:
        """Catch other layers for a while, without disturbing what is caught of the student."""
        before = self.listening, self.wanted, self.seen, self.autocast
        self.listening = True
        self.wanted = frozenset(wanted)
        self.seen = {}
        self._of_teacher = True
        try:
            yield self.seen
        finally:
            self.listening, self.wanted, self.seen, self.autocast = before
            self._of_teacher = False

    def __deepcopy__(self, memo: dict[int, Any]) -> "Taps":
        """A copied model has its own taps, which catch nothing: its layers belong to no distiller."""
        twin = object.__new__(Taps)
        twin.layers = []
        twin.listening = False
        twin.wanted = frozenset()
        twin.seen = {}
        twin.autocast = None
        twin._of_teacher = False
        twin._catch = twin._note
        return twin


class _Tapped:
    """What a tapped layer's class puts before its own."""

    apt_tap: tuple[Taps, int]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = super().__call__(*args, **kwargs)  # type: ignore[misc]
        taps, index = self.apt_tap
        taps.catch(index, output)
        return output


@functools.cache
def _tapped(kind: Any) -> Any:
    return type(kind.__name__, (_Tapped, kind), {"__module__": kind.__module__})


def untap(layer: nn.Module) -> None:
    """Give a layer its own class back."""
    if isinstance(layer, _Tapped):
        layer.__class__ = type(layer).__mro__[2]
        del layer.apt_tap
