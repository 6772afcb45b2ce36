"""Which tokens of a batch are real, by the masks and ids that a model is given."""

from typing import Any

import torch
from torch import Tensor

CLOSED = -1000.0  # below it an additive mask shuts a place off: fp16 has -65504, older code -10000


def real_tokens(mask: Any, length: int) -> Tensor | None:
    """1 where a token is real, 0 where it is padding: ``[B, T]``; None where the mask says nothing of it.

    Args:
        mask: ``[B, S]`` of the S = cached + T places, where 0 is padding; ``[B, 1, T, S]``, boolean or added to the
            logits, of which a token that may not see itself is padding; or such masks by the type of a layer.
        length: T.
    """
    if isinstance(mask, dict):
        mask = next(iter(mask.values()), None)
    if not isinstance(mask, Tensor) or mask.shape[-1] < length:
        return None
    if mask.dim() == 2:
        return mask if mask.shape[1] == length else mask[:, -length:]
    if mask.dim() != 4 or mask.shape[2] != length:
        return None
    itself = mask[:, 0].diagonal(mask.shape[-1] - length, dim1=-2, dim2=-1)
    return itself > CLOSED if itself.is_floating_point() else itself != 0


def expected_tokens(ids: Tensor, padding: int | None, ends: int | list[int] | None, targets: bool) -> Tensor | None:
    """1 where a token of a decoder counts, by its ids alone: labels, shifted by one behind a token that starts.

    Args:
        ids: ``[B, T]``.
        padding: the id that stands where no label is; None tells nothing.
        ends: ids with which a text ends.
        targets: whether those count that have a target, as with ``labels != -100``: the target is the id that follows.
            Of the last token it is not there: it has one unless it ends the text. Else those count that are no padding.
    """
    if padding is None:
        return None
    real = ids != padding
    real[:, 0] = True  # the start, which is often called as padding is
    if not targets:
        return real
    last = real[:, -1:]
    for end in [ends] if isinstance(ends, int) else ends or []:
        last = last & (ids[:, -1:] != end)
    return torch.cat([real[:, 1:], last], dim=1)
