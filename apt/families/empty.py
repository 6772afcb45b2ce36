"""What stands where a layer lost all its heads, or went as a whole: it computes nothing.

An `EmptyAttention` keeps what the output bias adds. An `EmptyLayer` hands on what it is given, under the number that
the layer had, so that no other layer, no plan and no checkpoint need know.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

HEAD_SIZES = ("head_dim", "attention_head_size", "key_value_proj_dim")  # what attentions call the features of a head


def _lists() -> Any:
    """The lists of what modules answer in the pass in flight, by name; None where none is kept.

    Only hooks of transformers itself are to know them, but they leave None out. A transformers without them lists what
    each layer hands on, which is None already.
    """
    try:
        from transformers.utils.output_capturing import _active_collector
    except ImportError:
        return None
    # A compiler follows the second of its two ways to hold the lists, and only where a model took that.
    readable = _active_collector.compiling or not torch.compiler.is_compiling()
    return _active_collector.get() if readable else None


@dataclass(frozen=True)
class AttentionPlace:
    """What others await of an attention that is called, where nothing is left of it.

    Args:
        weights: under what name a model lists its attention weights, "attentions" or "cross_attentions".
        layer_idx: where its keys lie in a cache; None where it has none.
        head_dim: features of one of its heads.
    """

    weights: str
    layer_idx: int | None
    head_dim: int

    @classmethod
    def of(cls, attention: nn.Module, weights: str) -> "AttentionPlace":
        """The place of an attention that is still there."""
        head_dim = next((size for name in HEAD_SIZES if (size := getattr(attention, name, None))), 1)
        return cls(weights, getattr(attention, "layer_idx", None), head_dim)

    def pass_by(self, hidden_states: Tensor, cache: Any) -> None:
        """List None, and tell a cache with a sliding window how many tokens passed.

        A model lists what its attentions answer in the order of their calls. And such a cache counts tokens layer by
        layer, and is cropped by that: its keys are of no head.
        """
        listed = _lists()
        if listed is not None and self.weights in listed:
            listed[self.weights].append(None)
        layers = getattr(cache, "layers", [])
        layer = layers[self.layer_idx] if self.layer_idx is not None and self.layer_idx < len(layers) else None
        if type(layer).__name__ == "DynamicSlidingWindowLayer":
            keys = hidden_states.new_zeros(hidden_states.shape[0], 0, hidden_states.shape[1], self.head_dim)
            cache.update(keys, keys, self.layer_idx)


class StandIn(nn.Module):
    """Stands where something went that a dense teacher may still run."""

    def __init__(self) -> None:
        super().__init__()
        # What went, while a teacher runs it. In a tuple it is no part of the model, yet moves with it.
        self.dense: tuple[nn.Module, ...] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "StandIn":
        for module in self.dense:
            module._apply(fn, recurse)
        return super()._apply(fn, recurse)


class EmptyAttention(StandIn):
    """Answers like an attention module with no heads: the output, and None for the attention weights.

    Args:
        attention: the module whose place it takes.
        out: its output projection, where that lies inside: its bias ``[O]`` is what is left of the output. None where
            it lies outside: the answer then has no features, and the bias is added there.
        weights: under what name a model lists its attention weights, "attentions" or "cross_attentions".
    """

    def __init__(self, attention: nn.Module, out: nn.Module | None = None, weights: str = "attentions") -> None:
        super().__init__()
        self.place = AttentionPlace.of(attention, weights)
        weight: Any = None if out is None else out.weight
        bias: Any = None if out is None else out.bias
        self.width = 0 if out is None else int(getattr(out, "n_out", weight.shape[0]))  # a tail of dimensions stays
        self.bias = None if bias is None else nn.Parameter(bias.detach()[: self.width], requires_grad=False)

    def set_width(self, width: int) -> None:
        """Follow the hidden dimensions; an answer without features has none to lose."""
        if self.width:
            self.width = width

    def output(self, hidden_states: Tensor) -> Tensor:
        """The answer in the shape that the next module expects, without memory of its own."""
        shape = (*hidden_states.shape[:-1], self.width)
        if self.bias is not None:
            return self.bias.to(hidden_states.dtype).expand(shape)
        return torch.zeros((), dtype=hidden_states.dtype, device=hidden_states.device).expand(shape)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        self.place.pass_by(hidden_states, kwargs.get("past_key_values"))
        return self.output(hidden_states), None

    def extra_repr(self) -> str:
        return f"width={self.width}"


class EmptyGPT2Attention(EmptyAttention):
    """GPT-2's: the output projection's bias goes through the dropout inside the attention, as it did before."""

    def __init__(self, attention: nn.Module, out: nn.Module | None = None, weights: str = "attentions") -> None:
        super().__init__(attention, out, weights)
        self.resid_dropout = attention.get_submodule("resid_dropout")

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        self.place.pass_by(hidden_states, kwargs.get("past_key_values"))
        return self.resid_dropout(self.output(hidden_states)), None


class EmptyLayer(StandIn):
    """Answers like a layer that adds nothing: with the stream as it came.

    Args:
        layer: whose place it takes.
        attentions: of the layer, in the order in which they ran.
        behind: what the layer answers behind the stream, as `Stack.behind` says.
    """

    def __init__(
        self, layer: nn.Module, attentions: Sequence[AttentionPlace], behind: tuple[str | None, ...] | None
    ) -> None:
        super().__init__()
        self.names = list(inspect.signature(layer.forward).parameters)
        self.attentions = tuple(attentions)
        self.behind = behind

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        stream = given[self.names[0]]
        for place in self.attentions:
            place.pass_by(stream, given.get("past_key_values"))
        _list_state(stream)
        if self.behind is None:
            return stream
        return stream, *(None if name is None else given.get(name) for name in self.behind)


def _list_state(stream: Tensor) -> None:
    """List the stream behind a layer, as the hooks of transformers do; before the first one also what came in."""
    listed = _lists()
    states = None if listed is None else listed.get("hidden_states")
    if states is None:
        return
    wanted = listed.get("_hidden_states_layers")
    for _ in range(1 if states else 2):
        states.append(stream if wanted is None or len(states) in wanted else None)
