"""Tied weights in an export: one tensor where the tie holds, and a config that says where it does not."""

from typing import Any

import torch
from torch import Tensor, nn

from apt.export.stock import described_class
from apt.families.ties import broken_ties, tied_names, untied_config


def settle_ties(model: nn.Module, config: Any, tensors: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """The config and the tensors to save, so that a reader ties what is tied and nothing else.

    A head that an adapter was merged into, or that the user has given a weight of its own, is one with the embeddings
    no more: it is written, and ``tie_word_embeddings`` is false. Where the class of the config ties in any case (T5),
    the two tensors alone say it: readers tie what is equal.

    Args:
        model: that is exported.
        config: that describes it.
        tensors: under every name, a tied one several times.
    """
    ties = tied_names(model)
    untied = untied_config(config) if broken_ties(model, tensors) else None
    if untied is not None:
        config = untied
        ties = tied_names(_empty(described_class(model, config), config))
    there = {name: first for name, first in ties.items() if name in tensors and first in tensors}
    tied = [name for name, first in there.items() if torch.equal(tensors[name], tensors[first])]
    return config, _apart({name: tensor for name, tensor in tensors.items() if name not in tied})


def _empty(kind: Any, config: Any) -> nn.Module:
    """A model of that class and config, without memory."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        made: nn.Module = kind(config)
    return made


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with memory of its own for every name, as safetensors wants it."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        apart[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return apart


@torch.no_grad()
def tie_what_is_equal(model: Any, stored: dict[str, Tensor], missing: set[str]) -> None:
    """Tie the weights of a model that was just loaded, but for those whose two names have tensors of their own.

    Args:
        model: of transformers.
        stored: what was loaded.
        missing: names of the model that were not.
    """
    for name in broken_ties(model, stored):
        model.all_tied_weights_keys.pop(name, None)
    model.tie_weights(missing_keys=set(missing), recompute_mapping=False)
