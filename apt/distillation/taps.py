"""Which layers are compared, and how their outputs are caught."""

import itertools
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from apt.layers.derived import Derived, derive, restore
from apt.layers.passes import Pass, Passes


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

    Each layer gets a class of its own (`apt.layers.derived`), derived from what it was, whose call hands on the output:
    outside everything the layer itself does, and so outside a region that is recomputed for gradient checkpointing,
    where a forward hook would stand inside in some versions of transformers.
    """

    def __init__(self, layers: Sequence[nn.Module] = (), passes: Passes | None = None) -> None:
        self.layers = list(layers)
        self.passes = passes
        self.caught: Pass | None = None  # the pass of what was seen
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
            derive(layer, _Tapped)
            layer.apt_tap = (self, index)  # type: ignore[assignment]

    def catch(self, index: int, output: Any) -> None:
        if self.listening and (self._of_teacher or torch.is_grad_enabled()):
            self._catch(index, output)

    def _note(self, index: int, output: Any) -> None:
        if index not in self.wanted:
            return
        hidden = output[0] if isinstance(output, tuple) else output
        self.seen[index] = hidden
        self.caught = None if self.passes is None else self.passes.known
        kind = hidden.device.type
        self.autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

    @contextmanager
    def of_teacher(self, wanted: Collection[int]) -> Iterator[dict[int, Tensor]]:
        """Catch other layers for a while, without disturbing what is caught of the student."""
        before = self.listening, self.wanted, self.seen, self.autocast, self.caught
        self.listening = True
        self.wanted = frozenset(wanted)
        self.seen = {}
        self._of_teacher = True
        try:
            yield self.seen
        finally:
            self.listening, self.wanted, self.seen, self.autocast, self.caught = before
            self._of_teacher = False

    def __reduce__(self) -> tuple[Any, ...]:
        """A copied model has taps that catch nothing; a distiller that is copied with it puts new ones in."""
        return Taps, ()


class _Tapped(Derived):
    """What a tapped layer's class puts before its own."""

    apt_tap: tuple[Taps, int] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = super().__call__(*args, **kwargs)  # type: ignore[misc]
        if self.apt_tap is not None:
            taps, index = self.apt_tap
            taps.catch(index, output)
        return output


def untap(layer: nn.Module) -> None:
    """Give a layer its own class back."""
    if isinstance(layer, _Tapped):
        layer.__dict__.pop("apt_tap", None)
        restore(layer, _Tapped)
