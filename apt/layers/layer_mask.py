"""The mask of a whole layer: how much of what it does to the stream counts, and how much that is.

With x what a layer is given and f(x) what it answers, a masked layer answers ``x + m (f(x) - x)``: at 0 exactly x, in a
pre-norm model and in a post-norm one, biases and all. Its score is block influence (ShortGPT, arXiv 2403.03853), the
mean over tokens that are no padding of ``1 - cos(x, f(x))``.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from apt.layers.derived import Derived, derive, restore
from apt.layers.passes import ValidTokens
from apt.layers.unit_mask import UnitMask
from apt.layers.unit_sums import add_total, start
from apt_kernels.autocast import outside_autocast

NAME = "apt_layer_mask"  # of the mask in its layer


class LayerMask(UnitMask):
    """The mask of one layer, one unit; `sums` holds the sum of ``1 - cos`` over tokens, and their number.

    Args:
        valid: the padding mask of the tokens that pass.
        device: of mask and statistics.
    """

    def __init__(self, valid: ValidTokens, device: torch.device | None = None) -> None:
        super().__init__(1, 1, valid, device, kind="layer")

    def influence(self) -> Tensor:
        """Block influence over what was collected, ``[1]``."""
        change, count = self.sums
        return change / count.clamp(min=1.0)

    def gate(self, given: Tensor, answer: Any) -> Any:
        """What the masked layer answers; where statistics are collected, its backward adds them.

        Args:
            given: the stream that the layer was given, ``[B, T, D]``.
            answer: of the layer: the stream behind it, or a tuple that begins with it.
        """
        if not (self.masked or self.collects):
            return answer
        stream = answer[0] if isinstance(answer, tuple) else answer
        if self.collects:
            seen = stream if stream.requires_grad else start(stream, self._starter)
            stream = add_total(seen, _change(given, stream, self.valid.of(stream)), self.sums.view(-1))
        if self.masked:
            stream = given + self.values.to(stream.dtype) * (stream - given)
        return (stream, *answer[1:]) if isinstance(answer, tuple) else stream


@outside_autocast
@torch.no_grad()
def _change(given: Tensor, stream: Tensor, valid: Tensor | None) -> Tensor:
    """Sum of ``1 - cos`` over the valid tokens, and their number: ``[2]`` in at least float32."""
    wide = torch.promote_types(stream.dtype, torch.float32)
    change = 1.0 - torch.nn.functional.cosine_similarity(given.to(wide), stream.to(wide), dim=-1)
    counted = torch.ones_like(change) if valid is None else valid.to(wide)
    return torch.stack([(change * counted).sum(), counted.sum()])


class _Masked(Derived):
    """What the class of a masked layer puts before its own. The mask is a module of the layer; a teacher has none."""

    @classmethod
    def members(cls, kind: Any) -> dict[str, Any]:
        @functools.wraps(kind.forward)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            answer = kind.forward(self, *args, **kwargs)
            mask = getattr(self, NAME)
            if mask is None:
                return answer
            return mask.gate(args[0] if args else kwargs["hidden_states"], answer)

        return {"forward": forward}


def mask_layer(layer: nn.Module, mask: LayerMask) -> None:
    """Put a mask on a layer."""
    layer.add_module(NAME, mask)
    derive(layer, _Masked)


def layer_mask(layer: nn.Module) -> LayerMask | None:
    """The mask of a layer; None where it has none."""
    mask = getattr(layer, NAME, None)
    return mask if isinstance(mask, LayerMask) else None


def unmask_layer(layer: nn.Module) -> None:
    """Take the mask of a layer out, where it has one."""
    if hasattr(layer, NAME):
        delattr(layer, NAME)
        restore(layer, _Masked)
