"""The methods by name. Each is a way to make the low-rank update; everything else they share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from apt.layers import APTAdapter, Delta, adapted
from apt.methods.adalora import AdaLoRA, RankBudget, orthogonality
from apt.methods.config import MethodConfig
from apt.methods.dynacsg import DynamicSpectral, expected_gates
from apt.methods.gsa import GatedSpectral, sparsity
from apt.methods.lowrank import RankImportance
from apt.methods.spectral import SpectralA, SpectralR

Make = Callable[[Tensor, int, MethodConfig], Delta]  # from the frozen weight, the rank r and the settings

Penalty = Callable[[Sequence[Delta], MethodConfig], Tensor | None]
Budget = Callable[[nn.Module, int, MethodConfig, int], RankBudget]  # from model, rank r, settings, steps of the run


@dataclass(frozen=True)
class Method:
    """What sets a method apart from the others."""

    make: Make | None = None  # None: A and B are parameters of the adapted linear
    own_scale: float | None = None  # where the formula fixes s
    penalty: Penalty | None = None  # what is added to the loss, from all updates of a model
    budget: Budget | None = None  # which ranks go while the model trains
    prunes: bool = False  # unless the setting `prune` says otherwise
    grows: bool = False  # whether ranks grow
    per_example: bool = False  # gates depend on the example: the layers above one have them, and nothing merges
    # Beside the task head: "adapters" of linears; a "prompt", and no linear is adapted; or "everything", where nothing
    # is put in: what the others are measured against.
    trains: Literal["adapters", "prompt", "everything"] = "adapters"

    @property
    def adapts(self) -> bool:
        """Whether linears get adapters."""
        return self.trains == "adapters"

    @property
    def prompt(self) -> bool:
        """Whether the model gets a prompt."""
        return self.trains == "prompt"


METHODS: dict[str, Method] = {
    "apt": Method(prunes=True, grows=True),
    "lora": Method(),
    "adalora": Method(AdaLoRA.of, penalty=orthogonality, budget=RankBudget),
    "adalora_simple": Method(RankImportance.of),
    "gsa": Method(GatedSpectral.of, own_scale=1.0, penalty=sparsity),
    "spectral_a": Method(SpectralA.of, own_scale=1.0),
    "spectral_r": Method(SpectralR.of, own_scale=1.0),
    "dynacsg": Method(DynamicSpectral.of, own_scale=1.0, penalty=expected_gates, per_example=True),
    "p_tuning": Method(trains="prompt"),
    "prefix_tuning": Method(trains="prompt"),
    "full": Method(trains="everything"),
}


def adapt(
    linear: nn.Module,
    method: str,
    rank: int,
    scale: float,
    settings: MethodConfig,
    *,
    init_std: float | None = None,
) -> APTAdapter:
    """The adapted linear of a method in place of a plain one; rank 0 is without an adapter.

    Args:
        linear: `nn.Linear` or ``Conv1D``, taken over and frozen.
        method: a name of `METHODS`.
        rank: r, at least 0; the rank of the update may be a multiple of it.
        scale: s, for the methods that do not fix it.
        settings: of the methods.
        init_std: of new rows of A.
    """
    kind = METHODS[method]
    dropout = settings.lora_dropout
    if rank == 0 or kind.make is None:
        return APTAdapter(linear, rank, scale, init_std=init_std, dropout=dropout)
    adapter = APTAdapter(linear, 0, scale if kind.own_scale is None else kind.own_scale, dropout=dropout)
    adapter.delta = kind.make(adapter.weight.detach(), rank, settings)
    return adapter


def penalty(model: nn.Module, method: str, settings: MethodConfig) -> Tensor | None:
    """What a method adds to the loss, a scalar; None where it adds nothing."""
    kind = METHODS[method]
    if kind.penalty is None:
        return None
    return kind.penalty([module.delta for _, module in adapted(model) if module.delta is not None], settings)
