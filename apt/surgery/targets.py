"""Which linears get an adapter, which are only replaced, and which fused projections must be split for that."""

import warnings
from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

from apt.apt_config import APTConfig
from apt.families import ROLES, Anatomy
from apt.families.hidden_parts import outer_linears
from apt.families.plain import Obstacle, find_obstacle, is_linear_like
from apt.layers import APTAdapter
from apt.layers.fused import fused_places
from apt.methods import METHODS, default_targets, layers_above, matching
from apt.pruning.kinds import kind_in
from apt.surgery.task_head import task_head

SHOWN = 3  # names in a warning
Split = dict[str, tuple[str, ...]]  # full name of a fused projection -> the roles of its parts, in their order


@dataclass(frozen=True)
class Places:
    """Where the parts of a patch go, by full names as they are once `split` is."""

    split: Split
    targets: list[str]  # linears that get an adapter with rank
    prunable: list[str]  # linears of the family's table, where units are to go
    outside: list[str] | None  # linears outside the layers that hold hidden dimensions; None where these stay
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
    head = [model] if method.trains == "everything" else task_head(model)
    prunable: list[str] = []
    outside = None
    if config.prunes and anatomy is not None:
        for part in anatomy.parts:
            kind_in(part, config.pruning.unit_types)  # refuses kinds that share a part
        if any(kind.holds_units for kind in config.pruning.kinds):
            anatomy.refuse_layers()
        prunable = [name for _, name in _places(anatomy, split)]
        if not prunable:
            raise ValueError("patch_model: every layer of this model is empty, so it has no prunable units")
        _refuse_to_prune(model, split, prunable)
        outside = _outside(anatomy, head, required="hidden" in config.pruning.unit_types)
    # A projection that is kept as it is stays whole.
    split = {name: roles for name, roles in split.items() if _obstacle(model, name) is None}
    return Places(split, targets, prunable, outside, head)


def _refuse_to_prune(model: nn.Module, split: Split, names: list[str]) -> None:
    """Raise ValueError where a linear of the layers is more than a plain one: it would lose the rest with its units."""
    stored = {f"{name}.{role}": name for name, roles in split.items() for role in roles}
    for name in dict.fromkeys(stored.get(name, name) for name in names):
        obstacle = _obstacle(model, name)
        if obstacle is not None:
            raise ValueError(
                f"patch_model: {name} {obstacle.text}, so it cannot be pruned; {obstacle.advice}, or use method='lora'"
            )


def _outside(anatomy: Anatomy, head: list[nn.Module], *, required: bool) -> list[str] | None:
    """Linears outside the layers that read or write the hidden dimensions, but for those that train in full.

    Args:
        anatomy: of the model.
        head: what trains in full.
        required: whether hidden dimensions are to go; otherwise they stay where one of these is no plain linear.

    Returns:
        Full names; None where hidden dimensions stay.

    Raises:
        ValueError: they are to go, and one of these is more than a plain linear.
    """
    try:
        outer = outer_linears(anatomy.model)
    except ValueError:
        return None  # hidden dimensions of this model cannot be removed
    in_full = {id(module) for part in head for module in part.modules()}
    outer = [name for name in outer if id(anatomy.model.get_submodule(name)) not in in_full]
    texts = {name: found.text for name in outer if (found := _obstacle(anatomy.model, name)) is not None}
    if texts and required:
        name, text = next(iter(texts.items()))
        raise ValueError(f"patch_model: {name} {text}, so hidden dimensions cannot go; take 'hidden' out of unit_types")
    return None if texts else outer


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

    A linear that is more than a plain one (`find_obstacle`) is kept as it is, which a warning tells.

    Raises:
        ValueError: a target matches nothing; or it names a linear that is more than a plain one, or a quantised one.
    """
    head = {id(module) for part in task_head(model) for module in part.modules()}
    there = [n for n, m in model.named_modules() if _holds_adapter(m) and id(m) not in head]
    linears = {part: name for name in there for part in ([f"{name}.{role}" for role in split.get(name, ())] or [name])}
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    usual = default_targets(model_type, list(linears)) if anatomy is None else anatomy.family.default_targets
    wanted = config.target_modules or usual
    if isinstance(wanted, str):
        output = getattr(model, "get_output_embeddings", lambda: None)()
        outputs = [n for n, module in model.named_modules() if module is output]
        found = dict.fromkeys(matching(wanted, linears, outputs), False)
        if not found:
            raise ValueError(f"patch_model: target_modules {wanted!r} matches no linear layer; {_some(linears)}")
        return _plain_ones(model, linears, found)
    found = {}
    for target in wanted:
        if anatomy is not None and target in ROLES:
            matches = [name for role, name in _places(anatomy, split) if role == target]
        else:
            matches = [
                name for name, whole in linears.items() if any(f".{n}".endswith(f".{target}") for n in (name, whole))
            ]
        named = bool(matches) and config.target_modules is not None
        matches = matches or [name for name in linears if f".{target}." in f".{name}"]
        if not matches:
            raise ValueError(f"patch_model: target_modules entry {target!r} matches no linear layer; {_some(linears)}")
        found.update({name: named or found.get(name, False) for name in matches})
    return _plain_ones(model, linears, found)


def _plain_ones(model: nn.Module, linears: dict[str, str], found: dict[str, bool]) -> list[str]:
    """Those of the targets that an adapter can go to; a warning names the others.

    Args:
        model: whose linears they are.
        linears: name of a target -> of the stored linear that it is, or is a part of.
        found: target -> whether the user named it.

    Raises:
        ValueError: the user named one of the others, one is quantised, or there are no others.
    """
    kept: dict[Obstacle, list[str]] = {}
    for name, named in found.items():
        stored = linears.get(name, name)
        obstacle = _obstacle(model, stored)
        if obstacle is not None and (named or obstacle.quantised):
            raise ValueError(f"patch_model: {stored} {obstacle.text}; {obstacle.advice}")
        if obstacle is not None:
            kept.setdefault(obstacle, []).append(name)
    for obstacle, names in kept.items():
        if sum(map(len, kept.values())) == len(found):
            raise ValueError(
                f"patch_model: {names[0]} {obstacle.text}, and there is no other target; {obstacle.advice}"
            )
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        warnings.warn(
            f"patch_model: no adapter goes to {', '.join(names[:SHOWN])}{more}: each {obstacle.text}", stacklevel=5
        )
    left_out = {name for names in kept.values() for name in names}
    return [name for name in found if name not in left_out]


def _obstacle(model: nn.Module, name: str) -> Obstacle | None:
    """Why a linear is kept as it is; None where it can be replaced, or has been."""
    return None if isinstance(model.get_submodule(name), APTAdapter) else find_obstacle(model, name)


def _with_gates(config: APTConfig, anatomy: Anatomy, targets: list[str]) -> list[str]:
    """Those of the targets that lie in a layer with gates."""
    above = tuple(f"{layer.path}." for layer in layers_above(anatomy, config.adapter))
    found = [name for name in targets if name.startswith(above)]
    if not found:
        raise ValueError(f"patch_model: no target lies above layer {config.adapter.context_layer}, where gates begin")
    return found


def _holds_adapter(module: nn.Module) -> bool:
    return is_linear_like(module) or isinstance(module, APTAdapter)


def _some(linears: Collection[str]) -> str:
    return f"there are {', '.join(list(linears)[:6])}, ..." if linears else "this model has none"
