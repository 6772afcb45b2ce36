"""Several adapters of one base model as one plain model: the mean of their adapted weights."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from apt.export.merged import merged_state
from apt.export.row_gate_files import has_row_gates
from apt.families.ties import give_own, say_untied
from apt.layers import adapted
from apt.surgery import uncompiled, unpatch_model


@torch.no_grad()
def fuse_adapters(models: Sequence[nn.Module], weights: Sequence[float] | None = None) -> nn.Module:
    """A plain model whose weights are the mean of those of the models with their adapters merged.

    ``W = sum_i w_i (W_0 + s_i B_i diag(g_i) A_i)``, w_i above 0 and normalised to sum 1, in at least float32: several
    adapters, each trained on its own, in one model. For spectral adapters whose `idx` name different blocks of singular
    directions the updates do not overlap (Zhang and Pilanci, 2024, section 4.2). Trained heads are averaged too.

    Args:
        models: patched, all from one base model; they are not changed.
        weights: of each; None weighs all alike.

    Returns:
        A model of its own, without adapters.

    Raises:
        ValueError: there are fewer than two, their bases differ, an update depends on the example, or the weights are
            not one positive number a model.
    """
    plain = [uncompiled(model) for model in models]
    shares = [1.0] * len(plain) if weights is None else [float(weight) for weight in weights]
    if len(plain) < 2 or len(shares) != len(plain) or min(shares) <= 0.0:
        raise ValueError(
            f"fuse_adapters: give at least two models and one weight above 0 for each, got {len(plain)} and {shares}"
        )
    for model in plain:
        if has_row_gates(model):
            raise ValueError("fuse_adapters: an update that depends on the example cannot be averaged into a weight")
        _check_base(plain[0], model)
    states = [merged_state(model) for model in plain]
    fused = unpatch_model(copy.deepcopy(plain[0]), merge=True)
    means = {}
    for name, first in states[0].items():
        if first.is_floating_point():
            wide = torch.promote_types(first.dtype, torch.float32)
            total = sum(share / sum(shares) * state[name].to(wide) for share, state in zip(shares, states, strict=True))
            means[name] = torch.as_tensor(total)
    _untie(fused, means)
    own = fused.state_dict()
    for name, mean in means.items():
        own[name].copy_(mean)
    return fused


def _untie(model: nn.Module, means: dict[str, Tensor]) -> None:
    """Give a tied weight one of its own under each name whose mean is not that of the first name."""
    first_of: dict[int, str] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        first = first_of.setdefault(id(parameter), name)
        if not torch.equal(means[name], means[first]):
            give_own(model, name)
    say_untied(model, means)


def _check_base(first: nn.Module, other: nn.Module) -> None:
    """That both stand on the same frozen weights."""
    theirs = dict(other.named_parameters())
    known = dict(first.named_parameters())
    adapters = {id(p) for model in (first, other) for _, m in adapted(model) for p in m.adapter_parameters()}
    for name, parameter in known.items():
        if parameter.requires_grad or id(parameter) in adapters:
            continue
        if name not in theirs or not torch.equal(theirs[name], parameter):
            raise ValueError(f"fuse_adapters: the models do not come from one base, {name} differs")
    missing = sorted(n for n, p in theirs.items() if n not in known and not p.requires_grad and id(p) not in adapters)
    if missing:
        raise ValueError(f"fuse_adapters: the models do not come from one base, {missing[0]} differs")
