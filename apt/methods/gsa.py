"""Gated spectral adapter: one trainable number for each of the largest singular directions of a weight."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from apt.layers import Delta
from apt.methods.config import MethodConfig
from apt.methods.svd import singular_triplets

ACTIVE = 0.01  # a gate above it changes its singular value by more than a percent


class GatedSpectral(Delta):
    """``W = U S V^T`` with ``S_i (1 + gate_i)`` for the k largest: ``A = V^T``, ``B = U``, ``g = S * gate``, s = 1.

    The bases are frozen; the gate starts at 0, where the layer is exactly the base, and is the only thing that trains.
    """

    U: Tensor  # [n_out, k]
    S: Tensor  # [k]
    Vh: Tensor  # [k, n_in]

    def __init__(self, u: Tensor, s: Tensor, vh: Tensor) -> None:
        super().__init__()
        for name, tensor in (("U", u), ("S", s), ("Vh", vh)):
            self.register_buffer(name, tensor)
        self.gate = nn.Parameter(torch.zeros_like(s))  # [k]

    @classmethod
    def of(cls, weight: Tensor, rank: int, settings: MethodConfig) -> "GatedSpectral":
        """Take the largest k directions of a weight ``[O, I]``, all where it has fewer."""
        count = min(settings.num_directions or 2 * rank, *weight.shape)
        return cls(*singular_triplets(weight, count, settings.svd_cache))

    @property
    def rank(self) -> int:
        return self.gate.numel()

    @property
    def num_active(self) -> int:
        return int((self.gate.detach().abs() > ACTIVE).sum())

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.Vh, self.U, self.S * self.gate

    def side(self, axis: str) -> list[Tensor]:
        return [self.U] if axis == "out" else [self.Vh]

    def extra_repr(self) -> str:
        return f"directions={self.rank}"


def sparsity(deltas: Sequence[Delta], settings: MethodConfig) -> Tensor | None:
    """``l1_weight * sum |gate|`` over all layers, which keeps most gates near 0."""
    terms = [delta.gate.abs().sum() for delta in deltas if isinstance(delta, GatedSpectral)]
    return settings.l1_weight * torch.stack(terms).sum() if terms and settings.l1_weight else None
