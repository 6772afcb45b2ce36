"""Weights that go under two names, such as a head that is the table of embeddings: what a config says of them."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def tied_names(model: nn.Module) -> dict[str, str]:
    """Second name -> first name of every weight that the class and the config of a model tie, whether it is so or not.

    Empty for a module that is none of transformers.
    """
    expand = getattr(model, "get_expanded_tied_weights_keys", None)
    return {} if expand is None else dict(expand(all_submodels=True))


def broken_ties(model: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    """Second names whose tensor is not that of the first name, though class and config tie the two."""
    pairs = tied_names(model).items()
    return [
        second
        for second, first in pairs
        if second in tensors and first in tensors and not torch.equal(tensors[second], tensors[first])
    ]


def untied_config(config: Any) -> Any | None:
    """A copy of a config that ties no word embeddings; None where its class ties them in any case, as that of T5."""
    untied = copy.deepcopy(config)
    for part in (untied, untied.get_text_config()):
        part.tie_word_embeddings = False
    read = type(config).from_dict(untied.to_dict())
    return None if read.tie_word_embeddings else untied


def say_untied(model: Any, tensors: Mapping[str, Tensor]) -> None:
    """Tell a model of transformers that weights of it are tied no more, so that nobody ties them again.

    Args:
        model: whose config and list of tied weights are changed, where ties are broken. What its config tied beside
            them (the bias of BERT's head) gets a tensor of its own, as in a model that is built so.
        tensors: its weights by name, under every name.
    """
    ties = tied_names(model)
    broken = broken_ties(model, tensors)
    if broken and untied_config(model.config) is not None:
        for part in (model.config, model.config.get_text_config()):
            part.tie_word_embeddings = False
        for name in ties.keys() - tied_names(model).keys() - set(broken):
            give_own(model, name)
            broken.append(name)
    for name in broken:
        model.all_tied_weights_keys.pop(name, None)


def give_own(model: nn.Module, name: str) -> None:
    """Put a parameter of its own, with the same numbers, in the place of the one of that name."""
    place, _, leaf = name.rpartition(".")
    shared = model.get_parameter(name)
    own = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
    setattr(model.get_submodule(place), leaf, own)
