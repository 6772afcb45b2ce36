"""Puts a method into a model, beside those that are there: the first by `patch_model`, others into what it left."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from apt.apt_config import APTConfig
from apt.families import known_anatomy
from apt.families.linears import replace_module
from apt.layers import APTAdapter, adapted
from apt.layers.fused import plain_linear
from apt.methods import adapt, join, rank_and_scale
from apt.methods.prompts import PrefixTuning, PTuningEmbedding, place_prompt, placed_prompt
from apt.surgery import PatchState, find_targets, patch_model, patch_state

TOGETHER = ("lora", "adalora_simple", "p_tuning", "prefix_tuning")  # methods of which one model may have several
OWN_PLACES = {PTuningEmbedding: "apt_ptuning_embeddings", PrefixTuning: "apt_prefix_tuning"}  # of prompts without hooks

Prompt = PTuningEmbedding | PrefixTuning


def add_adapters(model: nn.Module, method: str, *, share: bool = False, **settings: Any) -> None:
    """Adapters of a method on the linears that its targets name; where one is already, the two add up.

    Args:
        model: patched or not.
        method: "lora" or "adalora_simple".
        share: one A and one B for all new adapters of the same shape.
        settings: leaves of the config.

    Raises:
        ValueError: the model was patched with a method that goes with no other.
    """
    if not _is_patched(model):
        prompts = plain_prompts(model)
        patch_model(model, method=method, **settings)
        for prompt in prompts:  # which it froze
            prompt.requires_grad_(True)
        if share:
            _share([module for _, module in adapted(model) if module.rank])
        return
    _open_state(model)
    config = APTConfig().with_overrides(method=method, **settings)
    new: dict[str, APTAdapter] = {}
    for name in find_targets(model, config, known_anatomy(model), {}):
        there = model.get_submodule(name)
        rank, scale = rank_and_scale([name], config.rank, config.scale, config.adapter)
        linear = plain_linear(there, merge=False) if isinstance(there, APTAdapter) else there
        new[name] = adapt(linear, method, rank, scale, config.adapter)
    if share:
        _share(list(new.values()))
    for name, adapter in new.items():
        there = model.get_submodule(name)
        if isinstance(there, APTAdapter):
            join(there, adapter)
        else:
            replace_module(model, name, adapter)


def add_prompt(model: nn.Module, method: str, **settings: Any) -> None:
    """The prompt of a method in a model of a known family, which runs with it from now on.

    Raises:
        ValueError: it has a prompt already, or was patched with a method that goes with no other.
    """
    if not _is_patched(model):
        patch_model(model, method=method, **settings)
        return
    state = _open_state(model)
    anatomy = known_anatomy(model)
    if placed_prompt(model) is not None or anatomy is None:
        raise ValueError(f"efficient_finetuning: this model has a prompt already, so {method} cannot be added")
    config = APTConfig().with_overrides(method=method, **settings)
    state.hooks += place_prompt(anatomy, method, config.prompt)


def hold_prompt(model: nn.Module, prompt: Prompt) -> None:
    """Keep a prompt as a part of a model of no known family, which is frozen; its own code must use it.

    Raises:
        ValueError: it has one of this kind.
    """
    name = OWN_PLACES[type(prompt)]
    if hasattr(model, name):
        raise ValueError(f"efficient_finetuning: this model has a {type(prompt).__name__} already")
    if not _is_patched(model) and not plain_prompts(model):
        model.requires_grad_(False)
    first = next(model.parameters(), None)
    setattr(model, name, prompt if first is None else prompt.to(first.device))


def plain_prompts(model: nn.Module) -> Sequence[Prompt]:
    """The prompts that `hold_prompt` left."""
    found = (getattr(model, name, None) for name in OWN_PLACES.values())
    return [prompt for prompt in found if isinstance(prompt, Prompt)]


def _is_patched(model: nn.Module) -> bool:
    return isinstance(getattr(model, "_apt", None), PatchState)


def _open_state(model: nn.Module) -> PatchState:
    state = patch_state(model)
    if state.config.method not in TOGETHER or state.config.prunes:
        raise ValueError(
            f"efficient_finetuning: this model was patched with method {state.config.method!r}, which goes with no "
            f"other on one model; call apt.unpatch_model(model) first"
        )
    return state


def _share(adapters: Sequence[APTAdapter]) -> None:
    """One A and one B for all of one shape; LoRA's only, an importance is each layer's own."""
    first: dict[tuple[int, int, int], APTAdapter] = {}
    for adapter in adapters:
        owner = first.setdefault((adapter.n_in, adapter.n_out, adapter.rank), adapter)
        adapter.lora_A, adapter.lora_B = owner.lora_A, owner.lora_B
