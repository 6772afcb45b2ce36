"""Puts adapters, unit masks and prompts into a plain model, and takes them out again."""

from typing import Any

from torch import nn

from apt.apt_config import APTConfig
from apt.distillation import release
from apt.families import Anatomy, anatomy_of, known_family
from apt.families.adopted import adopt_stand_ins
from apt.families.ties import say_untied
from apt.layers.fused import restore_plain, split_fused
from apt.layers.gated_activation import put_activations, restore_activations
from apt.layers.layer_mask import unmask_layer
from apt.layers.passes import ValidTokens, place_passes, remove_passes
from apt.methods import METHODS, place_row_gates, remove_row_gates
from apt.methods.prompts import PROMPT, place_prompt, placed_prompt, remove_prompt
from apt.pruning.dimensions import hidden_group
from apt.pruning.units import block_params
from apt.surgery.around import unwatch, watch
from apt.surgery.hidden import place_dimensions, remove_dimensions
from apt.surgery.put_in import keep_few_kernels, put_adapters, put_layer_masks, put_unit_masks, share_inputs
from apt.surgery.save_notice import SAVE, place_notice, remove_saver, saver_of
from apt.surgery.state import PatchState, bare_model, forget_graphs, patch_state
from apt.surgery.tails import free_tails
from apt.surgery.targets import Places, find_places
from apt.surgery.task_head import narrow, widen

NOTICE = (
    "apt: this model is patched, so only apt can read what save_pretrained writes: adapters and masks lie beside the "
    "weights, and pruned layers have sizes of their own; for others save it with apt.export_model(model, folder)"
)

PRUNED = (
    "apt: this model lost units that its configuration still counts, so save_pretrained writes what nobody can read; "
    "save it with apt.export_model(apt.patch_model(model, method='lora'), folder)"
)


def patch_model(
    model: nn.Module, config: APTConfig | None = None, *, method: str = "apt", **overrides: Any
) -> nn.Module:
    """Freeze a model and put adapters and unit masks into it, in place.

    Adapters and the task head train, both in at least float32; everything else is frozen. Where units are to go, as
    with ``method="apt"`` or ``prune=True``, every linear of attention and FFN becomes an `APTAdapter` (rank 0 where
    nothing trains) and the output and down projections get a mask that costs nothing until a `Controller` opens it.
    Otherwise only the targets are replaced; this works for any ``nn.Module``.

    A model of PEFT with LoRA layers stays PEFT's, in parameters, names and methods; its LoRA linears get the fused op
    in place of their forward. It takes no config.

    Args:
        model: a Hugging Face model, any module where nothing is pruned, or a PEFT LoRA model; compiled already or not.
            Of a model of sentence-transformers it is the transformer inside; what stands behind that is left as it is.
        config: None is the default; `method` and `overrides` apply on top.
        method: "apt", "lora", "adalora", "adalora_simple", "gsa", "spectral_a", "spectral_r" or "dynacsg";
            or "p_tuning" or "prefix_tuning": no adapter, but a prompt and the task head train; or "full": nothing is
            put in, everything trains.
        overrides: leaves of the config by name.

    Returns:
        The same object.

    Raises:
        ValueError: the model is patched already, its family is unknown though units are to go, a target matches
            nothing, or a setting is unknown or out of range.
    """
    given = model
    model = bare_model(model)
    if isinstance(getattr(model, "_apt", None), PatchState):
        raise ValueError("patch_model: this model is patched already; call apt.unpatch_model(model) first")
    if given is not model:
        # What was compiled before knows nothing of the parts put in now.
        forget_graphs()
    keep_few_kernels(model)
    adopt_stand_ins(model)
    if _of_peft(model):
        _fuse_peft(model, config, method, overrides)
        return given
    if method != "apt" or config is None:
        overrides = {"method": method, **overrides}
    config = (config or APTConfig()).with_overrides(**overrides)
    anatomy = _anatomy_for(model, config)
    places = find_places(model, config, anatomy)
    state = _state_before(model, config, anatomy)
    state.saver = saver_of(model)
    _change(model, anatomy, places, state)
    if config.method != "full" or config.prunes:
        place_notice(model, NOTICE)
    return given


def _anatomy_for(model: nn.Module, config: APTConfig) -> Anatomy | None:
    """Find where things are in the model, where units are to go, or gates of the example or a prompt come in.

    Raises:
        ValueError: it is not known, or the model has nothing that the config could change.
    """
    needed = config.prunes or config.prompts or METHODS[config.method].per_example
    anatomy = anatomy_of(model) if needed or known_family(model) is not None else None
    if anatomy is not None and not anatomy.layers:
        raise ValueError("patch_model: the model has no layers, so it has no prunable units")
    if anatomy is not None and anatomy.gone and (config.prompts or METHODS[config.method].per_example):
        raise ValueError(
            f"patch_model: method {config.method!r} counts layers, and {anatomy.gone[0]} of this model went; save it "
            f"with apt.export_model and load it again first"
        )
    if placed_prompt(model) is not None and (config.prunes or config.prompts):
        raise ValueError("patch_model: this model came with a prompt, so it can be neither pruned nor given another")
    return anatomy


def _state_before(model: nn.Module, config: APTConfig, anatomy: Anatomy | None) -> PatchState:
    """The state of a patch, with what must be known of the model as it was before."""
    hf_config = getattr(model, "config", None)
    return PatchState(
        config=config,
        found=None if anatomy is None else anatomy.found,
        requires_grad={name: parameter.requires_grad for name, parameter in model.named_parameters()},
        use_cache=getattr(hf_config, "use_cache", None),
        block_params=0 if anatomy is None else block_params(anatomy),
        params_before=sum(parameter.numel() for parameter in model.parameters()),
    )


def _change(model: nn.Module, anatomy: Anatomy | None, places: Places, state: PatchState) -> None:
    """Freeze the model, put the parts in, and leave the state on it."""
    model.requires_grad_(False)
    if anatomy is None:
        state.init_seconds = put_adapters(model, state.config, places.targets)
    else:
        _put_parts(anatomy, places, state)
    for module in places.head:
        module.requires_grad_(True)
    state.targets = sorted(places.targets)
    state.hooks += watch(model)
    state.dtypes, hooks = widen(model, places.head)
    state.hooks += hooks
    model._apt = state  # type: ignore[assignment]


def _put_parts(anatomy: Anatomy, places: Places, state: PatchState) -> None:
    """Put adapters, masks, gates and the prompt into a model of a known family, with the hooks they need."""
    model = anatomy.model
    config = state.config
    split_fused(anatomy, places.split)
    # Asked once fused projections are split: as one they are not known to read hidden dimensions.
    outside = places.outside if config.prunes and anatomy.has_hidden else None
    state.hidden = outside is not None
    if config.prompts:
        state.hooks += place_prompt(anatomy, config.method, config.prompt)
    without_rank = [*places.prunable, *(outside or [])]
    state.init_seconds = put_adapters(model, config, places.targets, without_rank)
    share_inputs(anatomy)
    if config.prunes:
        passes = place_passes(anatomy)
        state.valid = {stack.name: ValidTokens(passes, stack.name) for stack in anatomy.stacks}
        put_unit_masks(anatomy, state.valid, config.pruning.unit_types)
        put_layer_masks(anatomy, state.valid)
        put_activations(anatomy)
        if state.hidden:
            place_dimensions(anatomy, state.valid)
    state.found = anatomy.found
    if METHODS[config.method].per_example:
        group = hidden_group(anatomy)
        state.hooks += place_row_gates(anatomy, config.adapter, None if group is None else group.mask)


def unpatch_model(model: nn.Module, *, merge: bool = False) -> nn.Module:
    """Put plain linear layers back, in place, and restore what was trainable; sizes stay as pruned.

    Args:
        model: patched by `patch_model`.
        merge: add the adapters into the weights first; otherwise what they learnt is dropped. On a model of PEFT use
            its own ``merge_and_unload``.

    Returns:
        The same object.

    Raises:
        ValueError: it is not patched, or what is to be merged depends on the example or is a prompt.
    """
    given = model
    model = bare_model(model)
    if given is not model:
        forget_graphs()
    if _of_peft(model):
        from apt.surgery.peft_layers import unfuse

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
    remove_row_gates(model)
    free_tails(model)
    restore_activations(model)
    if state.hidden:
        remove_dimensions(anatomy_of(model))
    restore_plain(model, merge=merge)
    if merge:
        say_untied(model, model.state_dict())
    for module in model.modules():
        unmask_layer(module)
    for hook in state.hooks:
        hook.remove()
    unwatch(model)
    remove_passes(model)
    narrow(model, state.dtypes)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(state.requires_grad.get(name, False))
    del model._apt
    remove_saver(model)
    if state.found and block_params(anatomy_of(model)) != state.block_params:
        place_notice(model, PRUNED)
    elif state.saver is not None:
        setattr(model, SAVE, state.saver)
    return given


def _of_peft(model: nn.Module) -> bool:
    """Whether any layer is one of PEFT's; asked without importing it."""
    return any(type(module).__module__.startswith(("peft.", "apt.surgery.peft_layers")) for module in model.modules())


def _fuse_peft(model: nn.Module, config: APTConfig | None, method: str, overrides: dict[str, Any]) -> None:
    from apt.surgery.peft_layers import fuse, is_peft

    if not is_peft(model):
        raise ValueError("patch_model: of PEFT's methods only LoRA runs on the fused op; train this model as it is")
    if config is not None or overrides or method not in ("apt", "lora"):
        raise ValueError(
            "patch_model: a PEFT model keeps PEFT's settings, so it takes no config, method or overrides; to prune "
            "while training, give the model without PEFT: patch_model(model.unload())"
        )
    fuse(model)
