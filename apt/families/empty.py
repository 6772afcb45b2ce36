"""What stands where a layer lost all its heads: it computes nothing and keeps what the output bias adds."""

from collections.abc import Callable
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


class EmptyAttention(nn.Module):
    """Answers like an attention module with no heads: the output, and None for the attention weights.

    Args:
        attention: the module whose place it takes.
        out: its output projection, where that lies inside: its bias ``[O]`` is what is left of the output. None where
            it lies outside: the answer then has no features, and the bias is added there.
        weights: under what name a model lists its attention weights, "attentions" or "cross_attentions".
    """

    def __init__(self, attention: nn.Module, out: nn.Module | None = None, weights: str = "attentions") -> None:
        super().__init__()
        self.weights = weights
        self.layer_idx = getattr(attention, "layer_idx", None)
        self.head_dim = next((size for name in HEAD_SIZES if (size := getattr(attention, name, None))), 1)
        weight: Any = None if out is None else out.weight
        bias: Any = None if out is None else out.bias
        self.width = 0 if out is None else int(getattr(out, "n_out", weight.shape[0]))  # a tail of dimensions stays
        self.bias = None if bias is None else nn.Parameter(bias.detach()[: self.width], requires_grad=False)
        # The attention, where a dense teacher still runs it. In a tuple it is no part of the model, yet moves with it.
        self.dense: tuple[nn.Module, ...] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "EmptyAttention":
        for module in self.dense:
            module._apply(fn, recurse)
        return super()._apply(fn, recurse)

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

    def pass_by(self, hidden_states: Tensor, cache: Any) -> None:
        """Do what others await of every attention that is called.

        A model lists what its attentions answer in the order of their calls: here that is None. And a cache with a
        sliding window counts the tokens that passed layer by layer, and is cropped by that: its keys are of no head.
        """
        listed = _lists()
        if listed is not None and self.weights in listed:
            listed[self.weights].append(None)
        layers = getattr(cache, "layers", [])
        layer = layers[self.layer_idx] if self.layer_idx is not None and self.layer_idx < len(layers) else None
        if type(layer).__name__ == "DynamicSlidingWindowLayer":
            keys = hidden_states.new_zeros(hidden_states.shape[0], 0, hidden_states.shape[1], self.head_dim)
            cache.update(keys, keys, self.layer_idx)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        self.pass_by(hidden_states, kwargs.get("past_key_values"))
        return self.output(hidden_states), None

    def extra_repr(self) -> str:
        return f"width={self.width}"
