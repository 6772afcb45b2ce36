"""The parts that a patch puts into a model: adapted linears and masks."""

import os
import time
from collections.abc import Collection, Sequence

import torch
from torch import nn

from apt.apt_config import APTConfig
from apt.families import Anatomy
from apt.families.linears import features, replace_module
from apt.layers import APTAdapter, share_input
from apt.layers.fused import FusedLinears
from apt.layers.layer_mask import LayerMask, mask_layer
from apt.layers.passes import ValidTokens
from apt.layers.unit_mask import UnitMask
from apt.methods import adapt, rank_and_scale
from apt.process.progress import progress
from apt.pruning.kinds import kind_in

CAPACITY = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "DNNL_PRIMITIVE_CACHE_CAPACITY")  # oneDNN's names of one variable


def keep_few_kernels(model: nn.Module) -> None:
    """Let oneDNN keep 64 of the kernels that it compiles, instead of 1,024, where a float32 model is on a CPU.

    There it compiles GELU, forward and backward, for every size: for each length of a batch and, once layers are
    pruned, each width. What it keeps for them are small blocks among the activations, around which glibc's heap cannot
    close again. To compile one takes a tenth of a millisecond. In 16 bits oneDNN computes the matrix products too,
    whose kernels take longer: there all stay.

    oneDNN reads the variable when it compiles its first kernel, so call this before the model runs. A value that the
    user has set stays.
    """
    first = next(model.parameters(), None)
    here = first is not None and first.device.type == "cpu" and first.dtype is torch.float32
    if here and not any(name in os.environ for name in CAPACITY):
        os.environ[CAPACITY[0]] = "64"


def put_adapters(model: nn.Module, config: APTConfig, targets: list[str], without_rank: Collection[str] = ()) -> float:
    """Put an adapted linear in the place of each named one, with rank where it is a target. Returns the seconds."""
    started = time.perf_counter()
    with_rank = set(targets)
    for name in progress(sorted({*targets, *without_rank}), f"{config.method} adapters", "layer"):
        linear = model.get_submodule(name)
        whole = name.rpartition(".")[0]
        called = [name, whole] if isinstance(model.get_submodule(whole), FusedLinears) else [name]
        rank, scale = rank_and_scale(called, config.rank, config.scale, config.adapter)
        # In a layer that lost all its units there is nothing left to adapt.
        if name not in with_rank or not all(features(linear)):
            rank = 0
        adapter = adapt(linear, config.method, rank, scale, config.adapter, init_std=config.tuning.init_std)
        replace_module(model, name, adapter)
    return time.perf_counter() - started


def put_unit_masks(anatomy: Anatomy, valid: dict[str, ValidTokens], unit_types: Sequence[str]) -> None:
    """Put the mask of its units before the output or down projection of every part."""
    for part in anatomy.parts:
        reader = part.reader
        kind = kind_in(part, unit_types)
        units = 0 if kind is None else kind.units_in(part)
        if isinstance(reader, APTAdapter) and kind is not None and units:
            tokens = valid[part.layer.stack.name]
            device = reader.weight.device
            reader.unit_mask = UnitMask(units, reader.n_in // units, tokens, device, kind=kind.name)


def put_layer_masks(anatomy: Anatomy, valid: dict[str, ValidTokens]) -> None:
    """Put its mask on every layer that is there."""
    for layer in anatomy.layers:
        if not layer.gone:
            device = next(layer.module.parameters()).device
            mask_layer(layer.module, LayerMask(valid[layer.stack.name], device))


def share_inputs(anatomy: Anatomy) -> None:
    """Let the adapted linears of a layer that read the same tensor be computed together."""
    for part in anatomy.parts:
        found = part.linears
        there = [found[role] for role in part.table.same_input if role in found]
        members = [linear for linear in there if isinstance(linear, APTAdapter)]
        if len(members) > 1:
            share_input(members)
