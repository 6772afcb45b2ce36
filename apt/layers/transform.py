"""Tr: from the hidden states of a student to those of its teacher."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TRANSFORM = "apt_transform"  # name of Tr in the model


class LayerTransform(nn.Module):
    """``Tr(h) = h + s * B A h``: the identity plus a trainable low-rank part (method.md 6.4).

    B starts at zero, so Tr starts as exactly the identity. All layers share it. It belongs to training alone: exports
    and counts of parameters leave it out. Where the student lost hidden dimensions, the teacher's stand in the same
    order, those of the student first: the identity is then ``[I; 0]``.

    Args:
        width: hidden dimensions D of the student.
        to: hidden dimensions of the teacher, at least D.
        rank: R of the trainable part.
        scale: unitless, s.
        generator: draws A; the global random state is left alone.
        like: device and dtype are those of this tensor, the dtype float32 at least.
    """

    lora_A: nn.Parameter  # [R, D]
    lora_B: nn.Parameter  # [to, R]

    def __init__(self, width: int, to: int, rank: int, scale: float, generator: torch.Generator, like: Tensor) -> None:
        super().__init__()
        self.scale = scale
        bound = 1.0 / max(1, width) ** 0.5  # LoRA's kaiming-uniform start
        start = (torch.rand(rank, width, generator=generator) * 2.0 - 1.0) * bound, torch.zeros(to, rank)
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.lora_A, self.lora_B = (nn.Parameter(tensor.to(like.device, dtype)) for tensor in start)

    def forward(self, h: Tensor) -> Tensor:
        delta = F.linear(F.linear(h.to(self.lora_A.dtype), self.lora_A), self.lora_B)
        return F.pad(h, (0, delta.shape[-1] - h.shape[-1])) + self.scale * delta
