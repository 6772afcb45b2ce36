"""A and B as an update of its own, one whose ranks have a learned importance, and several updates of one linear."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from apt.layers import APTAdapter, Delta
from apt.methods.config import MethodConfig

Triplet = tuple[Tensor, Tensor, Tensor]  # of A, B and g


class LowRank(Delta):
    """LoRA's update, ``g = 1``.

    Args:
        lora_A: ``[R, n_in]``.
        lora_B: ``[n_out, R]``.
    """

    def __init__(self, lora_A: nn.Parameter, lora_B: nn.Parameter) -> None:
        super().__init__()
        self.lora_A, self.lora_B = lora_A, lora_B

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    def factors(self) -> Triplet:
        return self.lora_A, self.lora_B, self.lora_A.new_ones(self.rank)

    def side(self, axis: str) -> list[Tensor]:
        return [self.lora_B] if axis == "out" else [self.lora_A]

    def rank_side(self) -> list[tuple[Tensor, int]]:
        return [(self.lora_A, 0), (self.lora_B, 1)]

    def extra_repr(self) -> str:
        return f"rank={self.rank}"


def new_factors(outputs: int, inputs: int, rank: int, like: Tensor) -> tuple[nn.Parameter, nn.Parameter]:
    """LoRA's start, in at least float32: A kaiming-uniform, B zero."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    a = torch.empty(rank, inputs, dtype=dtype, device=like.device)
    return nn.Parameter(nn.init.kaiming_uniform_(a, a=math.sqrt(5))), nn.Parameter(a.new_zeros(outputs, rank))


class RankImportance(LowRank):
    """``g = importance`` of each rank, trained, from 1; a layer uses as many ranks as are above the threshold.

    At least one is used. Which ones, `rank_allocation` says. The others have ``g = 0``; their importance still learns
    as if they were used (straight-through), so that a rank may come back.
    """

    def __init__(self, lora_A: nn.Parameter, lora_B: nn.Parameter, settings: MethodConfig) -> None:
        super().__init__(lora_A, lora_B)
        self.adaptive_rank = settings.adaptive_rank
        self.rank_allocation = settings.rank_allocation
        self.importance_threshold = settings.importance_threshold
        ones = torch.ones_like(lora_A.detach()[:, 0])
        self.rank_importance = nn.Parameter(ones, requires_grad=settings.adaptive_rank)  # [R]

    @classmethod
    def of(cls, weight: Tensor, rank: int, settings: MethodConfig) -> "RankImportance":
        return cls(*new_factors(weight.shape[0], weight.shape[1], rank, weight), settings)

    @property
    def num_active(self) -> int:
        return self.get_effective_rank()

    def get_effective_rank(self) -> int:
        """Ranks in use: those whose importance is above the threshold, at least one; all, if not adaptive."""
        return int(self.used().sum())

    @torch.no_grad()
    def used(self) -> Tensor:
        """Which ranks are in use, ``[R]``; found without waiting for the device."""
        importance = self.rank_importance
        if not self.adaptive_rank:
            return torch.ones_like(importance, dtype=torch.bool)
        count = (importance > self.importance_threshold).sum().clamp(min=1)
        places = torch.arange(self.rank, device=importance.device)
        if self.rank_allocation != "uniform":
            score: Tensor = importance
            if self.rank_allocation == "magnitude":
                score = importance.abs() * self.lora_A.norm(dim=1) * self.lora_B.norm(dim=0)
            places = score.argsort(descending=True, stable=True).argsort()
        return places < count

    def factors(self) -> Triplet:
        gate: Tensor = self.rank_importance
        if self.adaptive_rank:
            gate = gate - (gate * ~self.used()).detach()
        return self.lora_A, self.lora_B, gate

    def rank_side(self) -> list[tuple[Tensor, int]]:
        return [*super().rank_side(), (self.rank_importance, 0)]


class Joined(Delta):
    """The sum of several updates as one: their ranks stand one after the other, ``g`` has their scales, s = 1.

    Args:
        parts: the updates.
        scales: s of each.
    """

    def __init__(self, parts: Sequence[Delta], scales: Sequence[float]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.scales = tuple(scales)

    def deltas(self) -> list[Delta]:
        return [part for part in self.parts if isinstance(part, Delta)]

    @property
    def rank(self) -> int:
        return sum(part.rank for part in self.deltas())

    @property
    def num_active(self) -> float:
        return sum(part.num_active for part in self.deltas())

    def factors(self) -> Triplet:
        a, b, gates = zip(*(part.factors() for part in self.deltas()), strict=True)
        scaled = [scale * gate for scale, gate in zip(self.scales, gates, strict=True)]
        return torch.cat(a), torch.cat(b, dim=1), torch.cat(scaled)

    def side(self, axis: str) -> list[Tensor]:
        return [tensor for part in self.deltas() for tensor in part.side(axis)]


def updates(adapter: APTAdapter) -> list[Delta]:
    """The updates of an adapted linear that are modules: one, several, or none where A and B are its own."""
    if isinstance(adapter.delta, Joined):
        return adapter.delta.deltas()
    return [] if adapter.delta is None else [adapter.delta]


def join(adapter: APTAdapter, other: APTAdapter) -> None:
    """Give an adapted linear the update of another one beside its own: the output is the sum. Parameters stay objects.

    Raises:
        ValueError: their dropout differs, or one has an update that is more than A, B and an importance.
    """
    if adapter.dropout != other.dropout and adapter.rank:
        raise ValueError(
            f"methods: adapters of one linear share their dropout; it has {adapter.dropout}, not {other.dropout}"
        )
    parts: list[Delta] = []
    scales: list[float] = []
    for module in (adapter, other):
        if isinstance(module.delta, Joined):
            parts = [*parts, *module.delta.deltas()]
            scales = [*scales, *module.delta.scales]
        elif isinstance(module.delta, LowRank):
            parts = [*parts, module.delta]
            scales = [*scales, module.scale]
        elif module.delta is None and module.lora_A is not None and module.lora_B is not None:
            parts = [*parts, LowRank(module.lora_A, module.lora_B)]
            scales = [*scales, module.scale]
        elif module.rank:
            raise ValueError(f"methods: {type(module.delta).__name__} and another adapter do not go together")
    adapter.lora_A = adapter.lora_B = None
    adapter.dropout = other.dropout
    adapter.scale = 1.0
    adapter.delta = Joined(parts, scales).train(adapter.training)
