"""What stands where a layer lost all its heads: it computes nothing and keeps what the output bias adds."""

from typing import Any

import torch
from torch import Tensor, nn


class EmptyAttention(nn.Module):
    """Answers like an attention module, ``(output, weights)``, with no heads.

    Args:
        width: features of the answer: 0 where the output projection lies outside (its bias is added there), the hidden
            size where it lies inside.
        bias: of that inner output projection, ``[width]``, frozen; None where it has none.
    """

    def __init__(self, width: int, bias: Tensor | None = None) -> None:
        super().__init__()
        self.width = width
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        shape = (*hidden_states.shape[:-1], self.width)
        if self.bias is not None:
            return self.bias.to(hidden_states.dtype).expand(shape), None
        return torch.zeros((), dtype=hidden_states.dtype, device=hidden_states.device).expand(shape), None

    def extra_repr(self) -> str:
        return f"width={self.width}"
