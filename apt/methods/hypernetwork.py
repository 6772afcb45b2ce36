"""The small network behind the gates of DynaCSG, and how its logits open them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

START = -3.0  # of every logit: shut in evaluation, open once in 21 times in training


class HyperNetwork(nn.Module):
    """Maps the context of an example ``[B, D]`` to the logits of its gates ``[B, R]``: two layers, a ReLU between.

    The last layer starts at weight 0 and bias -3, so that every gate is shut in evaluation.

    Args:
        width: hidden dimensions D of the model.
        gates: R.
        num_params: how many numbers it may have, about; the layer between is as wide as they allow.
        like: gives device and dtype; it is at least float32.
    """

    def __init__(self, width: int, gates: int, num_params: int, like: Tensor) -> None:
        super().__init__()
        between = max(1, round((num_params - gates) / (width + gates + 1)))
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.read = nn.Linear(width, between, device=like.device, dtype=dtype)
        self.open = nn.Linear(between, gates, device=like.device, dtype=dtype)
        nn.init.zeros_(self.open.weight)
        nn.init.constant_(self.open.bias, START)

    def forward(self, context_BD: Tensor) -> Tensor:
        with torch.autocast(context_BD.device.type, enabled=False):
            logits_BR: Tensor = self.open(F.relu(self.read(context_BD)))
        return logits_BR


def logistic_noise(like: Tensor) -> Tensor:
    """The difference of two Gumbel variables: ``logit + noise > 0`` with probability ``sigmoid(logit)``."""
    info = torch.finfo(like.dtype)
    u = torch.rand_like(like).clamp_(info.tiny, 1.0 - info.eps)
    return torch.log(u) - torch.log1p(-u)


def open_gates(logits_BR: Tensor, noise_BR: Tensor | None, temperature: float) -> Tensor:
    """0 or 1 (Gumbel-sigmoid with straight-through): the gradient is that of ``sigmoid((logit + noise) / T)``."""
    if noise_BR is not None:
        logits_BR = logits_BR + noise_BR
    hard = (logits_BR > 0).to(logits_BR.dtype)
    if not torch.is_grad_enabled():
        return hard
    soft = torch.sigmoid(logits_BR / temperature)
    return hard + (soft - soft.detach())  # in this order exactly 0 or 1
