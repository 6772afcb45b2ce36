"""Mask gates as modules: where a unit is shut, and where its statistics are collected."""

import torch
from torch import Tensor, nn

import apt_kernels


class ValidTokens:
    """The padding mask of the batch in flight, shared by all gates of one model: ``[B, S]``, 1 real, 0 padding."""

    mask: Tensor | None = None


class MaskGate(nn.Module):
    """Multiplies a feature vector by a unit mask and collects the salience statistics of its units.

    It costs nothing until the controller sets `collecting` or a mask leaves 1. Each unit owns `unit_size` neighbouring
    features (a head its head_dim, a KV group all its query heads, a neuron one).

    Shapes: input and output ``[..., D]`` with ``D = num_units * unit_size``.
    """

    mask: Tensor  # [num_units], 1 kept, 0 pruned, between while it decays
    sums: Tensor  # [2, D], sum over tokens of |h| and of |dL/dy|
    count: Tensor  # [], tokens counted

    def __init__(self, num_units: int, unit_size: int, valid: ValidTokens, device: torch.device | None = None) -> None:
        super().__init__()
        self.unit_size = unit_size
        self.valid = valid
        self.collecting = False
        self.masked = False  # whether any mask differs from 1, kept here so that no step asks the device
        # Not persistent: the checkpoint room saves them with the plan that gave them their size.
        self.register_buffer("mask", torch.ones(num_units, device=device), persistent=False)
        self.register_buffer("sums", torch.zeros(2, num_units * unit_size, device=device), persistent=False)
        self.register_buffer("count", torch.zeros((), device=device), persistent=False)

    @property
    def num_units(self) -> int:
        return self.mask.numel()

    def set_mask(self, mask: Tensor) -> None:
        """Replace the mask; an all-ones mask switches the multiplication off."""
        self.mask.copy_(mask)
        self.masked = bool((mask != 1).any())

    def reset_sums(self) -> None:
        self.sums.zero_()
        self.count.zero_()

    def keep(self, kept: Tensor) -> None:
        """Drop all units but those at the positions `kept`; the masks of those are 1 from here on."""
        self.mask = torch.ones(kept.numel(), device=self.mask.device)
        self.sums = torch.zeros(2, kept.numel() * self.unit_size, device=self.sums.device)
        self.count.zero_()
        self.masked = False

    def forward(self, h: Tensor) -> Tensor:
        collecting = self.collecting and torch.is_grad_enabled() and h.requires_grad
        if not (self.masked or collecting) or self.num_units == 0:
            return h
        mask = self.mask.repeat_interleave(self.unit_size) if self.masked else None
        if not collecting:
            return apt_kernels.gate(h, mask)
        valid = self.valid.mask
        return apt_kernels.gate(h, mask, sums=self.sums, count=self.count, valid=valid)

    def extra_repr(self) -> str:
        return f"num_units={self.num_units}, unit_size={self.unit_size}"
