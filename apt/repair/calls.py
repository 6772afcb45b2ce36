"""The calls of the layers of a stack, recorded without running them, so that each can be made again alone."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache

from apt.layers.passes import Pass, Passes, ValidTokens


@dataclass(frozen=True)
class LayerCall:
    """What a layer is called with beside the stream, in one batch."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    known: Pass | None  # what the pass knew of its tokens
    valid: Tensor | None  # ``[B, T]``, 1 real, 0 padding; None: all are real

    def inside(self, passes: Passes | None, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What a function answers as a part of the pass of that call."""
        return function(*args, **kwargs) if passes is None else passes.run(self.known, function, *args, **kwargs)

    def again(self, layer: nn.Module, stream: Tensor, passes: Passes | None) -> Tensor:
        """The stream behind the layer."""
        answer = self.inside(passes, layer, stream, *self.args, **self.kwargs)
        found: Tensor = answer[0] if isinstance(answer, tuple) else answer
        return found


@dataclass
class Recorded:
    """The streams that come into a stack ``[B, T, D]``, one a batch, and the calls by layer and batch."""

    layers: Sequence[nn.Module]
    streams: list[Tensor] = field(default_factory=list)
    calls: list[list[LayerCall]] = field(default_factory=list)


@contextmanager
def recording(layers: Sequence[nn.Module], passes: Passes | None, valid: ValidTokens) -> Iterator[Recorded]:
    """Record the calls of these layers in the passes inside; all but the first hand on what they are given.

    The first runs, as others take more of its answer than the stream: T5's position bias.

    Args:
        layers: of one stack, in their order.
        passes: of the model.
        valid: the padding mask of the stack.
    """
    found = Recorded(layers, calls=[[] for _ in layers])
    first: list[Any] = []

    def stand_in(index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            rest = {name: _without_cache(value) for name, value in kwargs.items() if name != "hidden_states"}
            stream: Tensor = args[0] if args else kwargs["hidden_states"]
            known = None if passes is None else passes.current
            found.calls[index].append(LayerCall(tuple(map(_without_cache, args[1:])), rest, known, valid.mask))
            if index == 0:
                found.streams.append(stream.detach())
                first[:] = [forward(*args, **kwargs)]
            answer = first[0]
            return (stream, *answer[1:]) if isinstance(answer, tuple) else stream

        return run

    with ExitStack() as stack:
        for index, layer in enumerate(layers):
            plain = layer.forward
            layer.forward = stand_in(index, plain)
            stack.callback(layer.__dict__.pop, "forward")
        yield found


def _without_cache(value: Any) -> Any:
    """The argument; None for a cache, into which a layer that is called again would write again."""
    return None if isinstance(value, Cache) else value
