"""What stands where a layer lost all its heads: it computes nothing and keeps what the output bias adds."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class EmptyAttention(nn.Module):
    """Answers like an attention module with no heads: the output, and None for the attention weights.

    Args:
        attention: the module whose place it takes.
        out: its output projection, where that lies inside: its bias ``[O]`` is what is left of the output. None where
            it lies outside: the answer then has no features, and the bias is added there.
    """

    def __init__(self, attention: nn.Module, out: nn.Module | None = None) -> None:
        super().__init__()
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

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        return self.output(hidden_states), None

    def extra_repr(self) -> str:
        return f"width={self.width}"
