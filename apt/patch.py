"""Puts adapters and gates into a plain model, and takes them out again."""

import inspect
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from apt.activations import put_activations, restore_activations
from apt.adapters import APTAdapter, SharedInput, adapted
from apt.controller import APTConfig, PatchState, forget_graphs, patch_state, uncompiled
from apt.dimensions import (
    has_dimensions,
    hidden_group,
    live_views,
    outer_linears,
    place_dimensions,
    remove_dimensions,
)
from apt.distiller import TRANSFORM, release
from apt.families import ROLES, Family, find_family
from apt.fused import FusedLinears, fused_places, replace_module, restore_plain, split_fused
from apt.gates import MaskGate, ValidTokens
from apt.linears import features, is_linear
from apt.methods import (
    METHODS,
    adapt,
    default_targets,
    layers_above,
    matching,
    place_gates,
    rank_and_scale,
    remove_gates,
)
from apt.prompts import PROMPT, place_prompt, placed_prompt, remove_prompt
from apt.surgery import free_tails
from apt.task_head import narrow, task_head, widen
from apt.units import block_params, num_units, part_linears, unit_gates

Split = dict[str, tuple[str, ...]]  # full name of a fused projection -> the roles of its parts, in their order
IGNORED = -100  # the label of a token that no loss counts


def patch_model(
    model: nn.Module, config: APTConfig | None = None, *, method: str = "apt", **overrides: Any
) -> nn.Module:
    """Freeze a model and put adapters and gates into it, in place.

    Adapters and the task head train, both in at least float32; everything else is frozen. Where units are to go, as
    with ``method="apt"`` or ``prune=True``, every linear of attention and FFN becomes an `APTAdapter` (rank 0 where
    nothing trains) and the output and down projections get a gate that costs nothing until a `Controller` opens it.
    Otherwise only the targets are replaced; this works for any ``nn.Module``.

    A model of PEFT with LoRA layers stays PEFT's, in parameters, names and methods; its LoRA linears get the fused op
    in place of their forward. It takes no config.

    Args:
        model: a Hugging Face model, any module where nothing is pruned, or a PEFT LoRA model; compiled already or not.
        config: None is the default; `method` and `overrides` apply on top.
        method: "apt", "lora", "adalora", "gsa", "spectral_a", "spectral_r" or "dynacsg" (`apt.methods`); or "p_tuning"
            or "prefix_tuning" (`apt.prompts`): no adapter, but a prompt and the task head train.
        overrides: leaves of the config by name.

    Returns:
        The same object.

    Raises:
        ValueError: the model is patched already, its family is unknown though units are to go, a target matches
            nothing, or a setting is unknown or out of range.
    """
    given, model = model, uncompiled(model)
    if isinstance(getattr(model, "_apt", None), PatchState):
        raise ValueError("patch_model: this model is patched already; call apt.unpatch_model(model) first")
    if given is not model:  # what was compiled before knows nothing of the parts put in now
        forget_graphs()
    if _of_peft(model):
        _fuse_peft(model, config, method, overrides)
        return given
    if method != "apt" or config is None:
        overrides = {"method": method, **overrides}
    config = (config or APTConfig()).with_overrides(**overrides)
    per_example = METHODS[config.method].per_example
    needs_family = config.prunes or per_example or config.prompts
    family = find_family(model) if needs_family else _family_or_none(model)
    if family is not None and not family.layers(model):
        raise ValueError("patch_model: the model has no layers, so it has no prunable units")
    if placed_prompt(model) is not None and (config.prunes or config.prompts):
        raise ValueError("patch_model: this model came with a prompt, so it can be neither pruned nor given another")
    split, head = _to_split(model, config, family), task_head(model)
    targets = [] if config.prompts else find_targets(model, config, family, split)
    if per_example and family is not None:
        targets = _with_gates(model, config, family, targets)
    replaced = _prunable(model, family, split) if config.prunes and family is not None else targets
    hf_config = getattr(model, "config", None)
    state = PatchState(
        config=config,
        family=family,
        valid={} if family is None else {layer.stack.name: ValidTokens() for layer in family.layers(model)},
        requires_grad={name: p.requires_grad for name, p in model.named_parameters()},
        use_cache=getattr(hf_config, "use_cache", None),
        block_params=0 if family is None else block_params(model, family),
        params_before=sum(p.numel() for p in model.parameters()),
    )
    model.requires_grad_(False)
    if family is not None:
        split_fused(model, family, split)
        state.hidden = config.prunes and has_dimensions(model, family)
    if state.hidden and family is not None:
        in_full = {id(module) for part in head for module in part.modules()}
        outer = outer_linears(model, family)
        replaced = [*replaced, *(name for name in outer if id(model.get_submodule(name)) not in in_full)]
    if config.prompts and family is not None:
        state.hooks += place_prompt(model, family, config.method, config.prompt)
    state.init_seconds = _put_adapters(model, config, set(targets), sorted(set(targets) | set(replaced)))
    if family is not None:
        _share_inputs(model, family)
    if config.prunes and family is not None:
        _put_gates(model, family, state.valid)
        put_activations(model, family)
        if state.hidden:
            place_dimensions(model, family, state.valid)
        hook = _ValidTokenHook(model, family, state.valid)
        state.hooks.append(model.register_forward_pre_hook(hook, with_kwargs=True))
    if per_example and family is not None:
        group = hidden_group(model, family)
        state.hooks += place_gates(model, family, config.adapter, None if group is None else group.gate)
    for module in head:
        module.requires_grad_(True)
    state.dtypes, hooks = widen(model, head)
    state.hooks += hooks
    model._apt = state  # type: ignore[assignment]
    return given


def unpatch_model(model: nn.Module, *, merge: bool = False) -> nn.Module:
    """Put plain linear layers back, in place, and restore what was trainable; sizes stay as pruned.

    Args:
        model: patched by `patch_model`.
        merge: add the adapters into the weights first; otherwise what they learnt is dropped. On a model of PEFT use
            its own ``merge_and_unload``.
    """
    given, model = model, uncompiled(model)
    if given is not model:
        forget_graphs()
    if _of_peft(model):
        from apt.peft_fusion import unfuse

        unfuse(model)
        return given
    state = patch_state(model)
    if merge and METHODS[state.config.method].per_example:
        raise ValueError(
            f"unpatch_model: the update of method {state.config.method!r} depends on the example, so no weight can "
            f"hold it; keep the model patched, or save it with apt.export_model, which keeps the gates"
        )
    if any(name.startswith(f"{PROMPT}.") and name not in state.requires_grad for name, _ in model.named_parameters()):
        if merge:
            raise ValueError("unpatch_model: a prompt cannot be merged into weights; apt.export_model keeps it")
        remove_prompt(model)
    release(model)
    remove_gates(model)
    free_tails(model)
    restore_activations(model)
    if state.hidden and state.family is not None:
        remove_dimensions(model, state.family)
    restore_plain(model, merge=merge)
    for hook in state.hooks:
        hook.remove()
    narrow(model, state.dtypes)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(state.requires_grad.get(name, False))
    del model._apt
    return given


def _of_peft(model: nn.Module) -> bool:
    """Whether any layer is one of PEFT's; asked without importing it."""
    return any(type(module).__module__.startswith(("peft.", "apt.peft_fusion")) for module in model.modules())


def _fuse_peft(model: nn.Module, config: APTConfig | None, method: str, overrides: dict[str, Any]) -> None:
    from apt.peft_fusion import fuse, is_peft

    if not is_peft(model):
        raise ValueError("patch_model: of PEFT's methods only LoRA runs on the fused op; train this model as it is")
    if config is not None or overrides or method not in ("apt", "lora"):
        raise ValueError(
            "patch_model: a PEFT model keeps PEFT's settings, so it takes no config, method or overrides; to prune "
            "while training, give the model without PEFT: patch_model(model.unload())"
        )
    fuse(model)


class _ValidTokenHook:
    """Forward pre-hook that keeps the batch's padding masks where the gates of each stack read them."""

    def __init__(self, model: nn.Module, family: Family, valid: dict[str, ValidTokens]) -> None:
        self.names = list(inspect.signature(model.forward).parameters)
        self.sources = {stack.name: stack.valid for stack in family.stacks if stack.name in valid}
        self.valid = valid

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        for stack, sources in self.sources.items():
            source, mask = next(((name, given[name]) for name in sources if given.get(name) is not None), ("", None))
            if source == "labels" and mask is not None:
                mask = mask != IGNORED
            self.valid[stack].mask = mask if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None


def _family_or_none(model: nn.Module) -> Family | None:
    try:
        return find_family(model)
    except ValueError:
        return None


def _to_split(model: nn.Module, config: APTConfig, family: Family | None) -> Split:
    """The fused projections that must be split.

    To prune, all are; for adapters alone those of which a part is asked for by its role. An adapter on a fused
    projection that is named as a whole is one adapter.
    """
    if family is None or config.prompts:
        return {}
    named = () if isinstance(config.target_modules, str) else config.target_modules or family.default_targets
    wanted = set(ROLES if config.prunes else named)
    places = fused_places(model, family)
    return {name: part.same_input for name, (_, part) in places.items() if wanted.intersection(part.same_input)}


def _prunable(model: nn.Module, family: Family, split: Split) -> list[str]:
    """Full names of every linear in the family's table."""
    names = [name for _, name in _places(model, family, split)]
    if not names:
        raise ValueError("patch_model: the model has no layers, so it has no prunable units")
    return names


def _places(model: nn.Module, family: Family, split: Split) -> list[tuple[str, str]]:
    """Role and full name of every linear of the family's table that is there, or will be once `split` is.

    A layer may be empty.
    """
    paths = {id(module): name for name, module in model.named_modules()}
    found: list[tuple[str, str]] = []
    for layer in family.layers(model):
        there = dict(layer.module.named_modules())
        for part in layer.stack.parts:
            if part.fused_linear in there:
                name = paths[id(there[part.fused_linear])]
                found += [(role, f"{name}.{role}") for role in split.get(name, ())]
            linears = part_linears(layer, part).items()
            found += [(role, paths[id(linear)]) for role, linear in linears if _holds_adapter(linear)]
    return found


def find_targets(model: nn.Module, config: APTConfig, family: Family | None, split: Split) -> list[str]:
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
    wanted = config.target_modules or (family.default_targets if family else default_targets(model_type, list(linears)))
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
        if family is not None and target in ROLES:
            matches = [name for role, name in _places(model, family, split) if role == target]
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


def _with_gates(model: nn.Module, config: APTConfig, family: Family, targets: list[str]) -> list[str]:
    """Those of the targets that lie in a layer with gates."""
    paths = {id(module): name for name, module in model.named_modules()}
    above = tuple(f"{paths[id(layer.module)]}." for layer in layers_above(model, family, config.adapter))
    found = [name for name in targets if name.startswith(above)]
    if not found:
        raise ValueError(f"patch_model: no target lies above layer {config.adapter.context_layer}, where gates begin")
    return found


def _holds_adapter(module: nn.Module) -> bool:
    return is_linear(module) or isinstance(module, APTAdapter)


def _some(linears: Collection[str]) -> str:
    return f"there are {', '.join(list(linears)[:6])}, ..." if linears else "this model has none"


def _put_adapters(model: nn.Module, config: APTConfig, targets: set[str], names: list[str]) -> float:
    """Put an adapted linear in the place of each named one, with rank where it is a target. Returns the seconds."""
    from tqdm.auto import tqdm

    started = time.perf_counter()
    for name in tqdm(names, desc=f"{config.method} adapters", unit="layer", delay=2.0, leave=False):
        linear, whole = model.get_submodule(name), name.rpartition(".")[0]
        names = [name, *([whole] if isinstance(model.get_submodule(whole), FusedLinears) else [])]
        rank, scale = rank_and_scale(names, config.rank, config.scale, config.adapter)
        rank = rank if name in targets and all(features(linear)) else 0  # of a layer that lost all, nothing is left
        adapter = adapt(linear, config.method, rank, scale, config.adapter, init_std=config.tuning.init_std)
        replace_module(model, name, adapter)
    return time.perf_counter() - started


def _put_gates(model: nn.Module, family: Family, valid: dict[str, ValidTokens]) -> None:
    for layer in family.layers(model):
        for part in layer.stack.parts:
            reader = part_linears(layer, part).get(part.reader)
            if isinstance(reader, APTAdapter) and part.counted in part_linears(layer, part):
                units, tokens = num_units(layer, part), valid[layer.stack.name]
                reader.gate_in = MaskGate(units, reader.n_in // max(1, units), tokens, reader.weight.device)


def _share_inputs(model: nn.Module, family: Family) -> None:
    """Let the adapted linears of a layer that read the same tensor be computed together."""
    for layer in family.layers(model):
        for part in layer.stack.parts:
            found = part_linears(layer, part)
            members = [m for role in part.same_input if isinstance(m := found.get(role), APTAdapter)]
            if len(members) > 1:
                SharedInput(members)


@dataclass(frozen=True)
class Summary:
    """What is trainable, gone and left. Counts of the whole model are with the adapters merged."""

    sparsity: float  # 1 - kept / total of the block parameters
    params_before: int
    params_after: int
    trainable_params: int
    units: dict[str, int]  # heads (KV groups) and neurons left in every unit group: "layers.0.heads": 12, ...
    hidden: int  # hidden dimensions; 0 where they cannot be removed
    masked: int  # units whose mask is below 1
    ranks: dict[str, int]  # of every adapter
    # Ranks that change the output, adapter by adapter: gates that have left 0, or that an example opens, on average.
    active: dict[str, float]
    virtual_tokens: int  # of the prompt; 0 where there is none
    init_seconds: float  # that the start of the adapters took, decompositions included

    @property
    def heads(self) -> list[int]:
        """KV groups left, attention by attention."""
        return [count for name, count in self.units.items() if name.endswith("heads")]

    @property
    def neurons(self) -> list[int]:
        """Neurons left, layer by layer."""
        return [count for name, count in self.units.items() if name.endswith("neurons")]

    def __str__(self) -> str:
        rows: dict[str, list[int]] = {}
        for name, count in self.units.items():
            stack, _, kind = name.split(".")
            rows.setdefault(kind if stack == "layers" else f"{stack} {kind}", []).append(count)
        ranks, active = sorted(self.ranks.values()), self.active.values()
        spread = f"{ranks[0]}-{ranks[-1]} over {len(ranks)} adapters" if ranks else "no adapters"
        return "\n".join(
            [
                f"parameters  {self.params_after:,} of {self.params_before:,} ({self.trainable_params:,} train)",
                f"sparsity    {self.sparsity:.1%} of the block parameters, {self.masked} units masked",
                *(f"{title:<11} {' '.join(map(str, counts))}" for title, counts in rows.items()),
                f"hidden      {self.hidden or 'stay'}",
                f"ranks       {spread}",
                *([f"prompt      {self.virtual_tokens} virtual tokens"] if self.virtual_tokens else []),
                *([f"active      {sum(active):g} of {sum(ranks)} gates"] if sum(active) != sum(ranks) else []),
            ]
        )


def summary(model: nn.Module) -> Summary:
    """Count a patched model. Raises ValueError on one that is not patched."""
    model = uncompiled(model)
    state = patch_state(model)
    modules = dict(adapted(model))
    group = hidden_group(model, state.family)
    ours, prompt = (f"{TRANSFORM}.", f"{PROMPT}."), placed_prompt(model)
    parameters = sum(p.numel() for name, p in model.named_parameters() if not name.startswith(ours))
    kept = 0 if prompt is None else sum(p.numel() for p in prompt.plain().parameters())  # in an export
    tails = sum(stored.numel() - live.numel() for stored, live in live_views(model, group))
    adapters = sum(p.numel() for m in modules.values() for p in m.adapter_parameters())
    gates: dict[str, MaskGate | None] = {}
    sparsity = 0.0
    if state.config.prunes and state.family is not None:
        gates = unit_gates(model, state.family)
        sparsity = 1.0 - block_params(model, state.family) / state.block_params
    masks = [*gates.values(), None if group is None else group.gate]
    return Summary(
        sparsity=sparsity,
        params_before=state.params_before,
        params_after=parameters - tails - adapters + kept,
        trainable_params=sum(p.numel() for p in model.parameters() if p.requires_grad),
        units={name: 0 if gate is None else gate.num_units for name, gate in gates.items()},
        hidden=0 if group is None else group.num_units,
        masked=sum(int((gate.mask < 1).sum()) for gate in masks if gate is not None),
        ranks={name: module.rank for name, module in modules.items() if module.rank},
        active={name: m.rank if m.delta is None else m.delta.num_active for name, m in modules.items() if m.rank},
        virtual_tokens=0 if prompt is None else prompt.num_virtual_tokens,
        init_seconds=state.init_seconds,
    )
