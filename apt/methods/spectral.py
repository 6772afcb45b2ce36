"""Spectral adapters (Zhang and Pilanci, 2024, arXiv 2405.13952): the top singular vectors are moved, or turned.

Both stand in delta form, the difference to W as one product of rank 2r: the difference of two large products would be
lost in bfloat16. It is exactly zero at the start.
"""

import torch
from torch import Tensor, nn

from apt.layers import Delta
from apt.methods.config import MethodConfig
from apt.methods.svd import singular_triplets


class _Spectral(Delta):
    """The frozen block of r singular directions."""

    U: Tensor  # [n_out, r]
    S: Tensor  # [r]
    Vh: Tensor  # [r, n_in]

    def __init__(self, u: Tensor, s: Tensor, vh: Tensor) -> None:
        super().__init__()
        for name, tensor in (("U", u), ("S", s), ("Vh", vh)):
            self.register_buffer(name, tensor)

    @property
    def rank(self) -> int:
        """The rank of the update: twice the directions."""
        return 2 * self.S.numel()

    def extra_repr(self) -> str:
        return f"directions={self.S.numel()}"


def _block(weight: Tensor, rank: int, settings: MethodConfig) -> tuple[Tensor, Tensor, Tensor]:
    """U, S and V^T of directions ``idx r`` up to ``(idx + 1) r``; of a weight with fewer than r, all."""
    rank = rank if settings.idx else min(rank, *weight.shape)
    first, last = settings.idx * rank, (settings.idx + 1) * rank
    if last > min(weight.shape):
        raise ValueError(
            f"methods: idx {settings.idx} with rank {rank} asks for singular directions {first} to {last - 1}, but a "
            f"weight of {list(weight.shape)} has {min(weight.shape)}; use a smaller rank or idx"
        )
    u, s, vh = singular_triplets(weight, last, settings.svd_cache)
    return u[:, first:].contiguous(), s[first:].contiguous(), vh[first:].contiguous()


class SpectralA(_Spectral):
    """``[U + dU] S [V + dV]^T`` in the place of a block ``U S V^T`` of W: dU and dV train, from 0.

    ``B = [dU, U]``, ``g = [S, S]``, ``A = [(V + dV)^T; dV^T]``, s = 1.
    """

    def __init__(self, u: Tensor, s: Tensor, vh: Tensor) -> None:
        super().__init__(u, s, vh)
        self.delta_U = nn.Parameter(torch.zeros_like(u))  # [n_out, r]
        self.delta_Vh = nn.Parameter(torch.zeros_like(vh))  # [r, n_in]

    @classmethod
    def of(cls, weight: Tensor, rank: int, settings: MethodConfig) -> "SpectralA":
        return cls(*_block(weight, rank, settings))

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        a = torch.cat([self.Vh + self.delta_Vh, self.delta_Vh])
        return a, torch.cat([self.delta_U, self.U], dim=1), torch.cat([self.S, self.S])

    def side(self, axis: str) -> list[Tensor]:
        return [self.U, self.delta_U] if axis == "out" else [self.Vh, self.delta_Vh]


class SpectralR(_Spectral):
    """``[U R_U] S C [V R_V]^T`` in the place of a block ``U S V^T`` of W: rotations R and scales C train.

    ``R = (I + Q)(I - Q)^-1`` with Q skew (Cayley), from an unconstrained matrix that starts at 0; C starts at 1. With
    ``U' = U R_U``, ``V' = V R_V``, ``S' = S C`` the update is ``B = [U' - U, U]``, ``g = [S', 1]``,
    ``A = [V'^T; S' (V' - V)^T + (S' - S) V^T]``, s = 1.
    """

    def __init__(self, u: Tensor, s: Tensor, vh: Tensor) -> None:
        super().__init__(u, s, vh)
        self.turn_U = nn.Parameter(s.new_zeros(s.numel(), s.numel()))  # [r, r]
        self.turn_V = nn.Parameter(s.new_zeros(s.numel(), s.numel()))  # [r, r]
        self.C = nn.Parameter(torch.ones_like(s))  # [r]

    @classmethod
    def of(cls, weight: Tensor, rank: int, settings: MethodConfig) -> "SpectralR":
        return cls(*_block(weight, rank, settings))

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(self.S.device.type, enabled=False):
            moved_U = self.U @ rotation_minus_identity(self.turn_U)
            moved_Vh = rotation_minus_identity(self.turn_V).T @ self.Vh  # (V' - V)^T
            scaled = self.S * self.C
            lower = scaled[:, None] * moved_Vh + (self.S * (self.C - 1.0))[:, None] * self.Vh
            a = torch.cat([self.Vh + moved_Vh, lower])
            return a, torch.cat([moved_U, self.U], dim=1), torch.cat([scaled, torch.ones_like(scaled)])

    def side(self, axis: str) -> list[Tensor]:
        return [self.U] if axis == "out" else [self.Vh]


def rotation_minus_identity(free: Tensor) -> Tensor:
    """``R - I = 2 Q (I - Q)^-1`` with ``Q = (free - free^T) / 2``, ``[r, r]``: exactly 0 where free is 0."""
    skew = 0.5 * (free - free.T)
    return torch.linalg.solve(torch.eye(len(free), dtype=free.dtype, device=free.device) - skew, 2.0 * skew, left=False)
