"""Which linears get an adapter, which are only replaced, and which fused projections must be split for that."""

from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

from apt.apt_config import APTConfig
from apt.families import ROLES, Anatomy
from apt.families.linears import is_linear
from apt.layers import APTAdapter
from apt.layers.fused import fused_places
from apt.methods import METHODS, default_targets, layers_above, matching
from apt.pruning.kinds import kind_in
from apt.surgery.task_head import task_head

Split = dict[str, tuple[str, ...]]  # full name of a fused projection -> the roles of its parts, in their order


@dataclass(frozen=True)
class Places:
    """Where the parts of a patch go, by full names as they are once `split` is."""

    split: Split
    targets: list[str]  # linears that get an adapter with rank
    prunable: list[str]  # linears of the family's table, where units are to go
    head: list[nn.Module]  # what trains in full


def find_places(model: nn.Module, config: APTConfig, anatomy: Anatomy | None) -> Places:
    """Decide where the parts go; change nothing.

    Raises:
        ValueError: a target matches nothing, or lies where it cannot go, or nothing is left to prune.
    """
    method = METHODS[config.method]
    split = _to_split(config, anatomy)
    targets = find_targets(model, config, anatomy, split) if method.adapts else []
    if method.per_example and anatomy is not None:
        targets = _with_gates(config, anatomy, targets)
    prunable = []
    if config.prunes and anatomy is not None:
        for part in anatomy.parts:
            kind_in(part, config.pruning.unit_types)  # refuses kinds that share a part
        prunable = [name for _, name in _places(anatomy, split)]
        if not prunable:
            raise ValueError("patch_model: every layer of this model is empty, so it has no prunable units")
    head = [model] if method.trains == "everything" else task_head(model)
    return Places(split, targets, prunable, head)


def _to_split(config: APTConfig, anatomy: Anatomy | None) -> Split:
    """The fused projections that must be split.

    To prune, all are; for adapters alone those of which a part is asked for by its role. An adapter on a fused
    projection that is named as a whole is one adapter.
    """
    if anatomy is None or not METHODS[config.method].adapts:
        return {}
    named = () if isinstance(config.target_modules, str) else config.target_modules or anatomy.family.default_targets
    wanted = set(ROLES if config.prunes else named)
    roles = {name: part.table.same_input for name, part in fused_places(anatomy).items()}
    return {name: same_input for name, same_input in roles.items() if wanted.intersection(same_input)}


def _places(anatomy: Anatomy, split: Split) -> list[tuple[str, str]]:
    """Role and full name of every linear of the family's table that is there, or will be once `split` is.

    A layer may be empty.
    """
    found: list[tuple[str, str]] = []
    for part in anatomy.parts:
        found += [(role, f"{part.fused_path}.{role}") for role in split.get(part.fused_path or "", ())]
        found += [(role, part.paths[role]) for role, linear in part.linears.items() if _holds_adapter(linear)]
    return found


def find_targets(model: nn.Module, config: APTConfig, anatomy: Anatomy | None, split: Split) -> list[str]:
    """Full names of the linears, plain or adapted, that get an adapter.

    A target is a role of the family's table, the full name of a linear, or an ending of it after a dot; the name of a
    projection that is split stands for all its parts. Where no linear is called so, it is the name, or a part of the
    name, of a module around linears, and stands for all of them. One text is a regular expression for full names, or
    "all-linear". The pooler and what lies outside the base model is trained in full, so it gets no adapter.
    """
    head = {id(module) for part in task_head(model) for module in part.modules()}
    there = [n for n, m in model.named_modules() if _holds_adapter(m) and id(m) not in head]
    linears = {part: name for name in there for part in ([f"{name}.{role}" for role in split.get(name, ())] or [name])}
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    usual = default_targets(model_type, list(linears)) if anatomy is None else anatomy.family.default_targets
    wanted = config.target_modules or usual
    readers = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
    if isinstance(wanted, str):
        output = getattr(model, "get_output_embeddings", lambda: None)()
        unread = [n for n in linears if isinstance(model.get_submodule(n.rpartition(".")[0]), readers)]
        outputs = [n for n, module in model.named_modules() if module is output]
        matches = [n for n in matching(wanted, linears, outputs) if n not in unread]
        if not matches:
            raise ValueError(f"patch_model: target_modules {wanted!r} matches no linear layer; {_some(linears)}")
        return matches
    found: dict[str, None] = {}
    for target in wanted:
        if anatomy is not None and target in ROLES:
            matches = [name for role, name in _places(anatomy, split) if role == target]
        else:
            matches = [
                name for name, whole in linears.items() if any(f".{n}".endswith(f".{target}") for n in (name, whole))
            ]
        matches = matches or [name for name in linears if f".{target}." in f".{name}"]
        past = [n for n in matches if isinstance(model.get_submodule(n.rpartition(".")[0]), readers)]
        if past:
            raise ValueError(
                f"patch_model: torch reads the weight of {past[0]} without calling it; leave {target!r} out"
            )
        if not matches:
            raise ValueError(f"patch_model: target_modules entry {target!r} matches no linear layer; {_some(linears)}")
        found.update(dict.fromkeys(matches))
    return list(found)


def _with_gates(config: APTConfig, anatomy: Anatomy, targets: list[str]) -> list[str]:
    """Those of the targets that lie in a layer with gates."""
    above = tuple(f"{layer.path}." for layer in layers_above(anatomy, config.adapter))
    found = [name for name in targets if name.startswith(above)]
    if not found:
        raise ValueError(f"patch_model: no target lies above layer {config.adapter.context_layer}, where gates begin")
    return found


def _holds_adapter(module: nn.Module) -> bool:
    return is_linear(module) or isinstance(module, APTAdapter)


def _some(linears: Collection[str]) -> str:
    return f"there are {', '.join(list(linears)[:6])}, ..." if linears else "this model has none"
