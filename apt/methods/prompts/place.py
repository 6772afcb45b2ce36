"""Puts a prompt into a model and takes it out: one module under the name `PROMPT`, wrappers around its stack."""

import inspect
from typing import Any

import torch
from torch import nn

from apt.families import Anatomy
from apt.families.anatomy import head_size
from apt.layers.around import wrap
from apt.methods.prompts.config import PromptConfig
from apt.methods.prompts.modules import PrefixTuning, PTuningEmbedding
from apt.methods.prompts.prefixes import FillCache
from apt.methods.prompts.tokens import InsertTokens, SeeTokens

PROMPT = "apt_prompt"  # name of the prompt in the model
READ_FIRST = ("ForSequenceClassification", "ForMultipleChoice")  # models that read the first place of an encoder

Prompt = PTuningEmbedding | PrefixTuning


def placed_prompt(model: nn.Module) -> Prompt | None:
    """The prompt of a model, if it has one."""
    found = getattr(model, PROMPT, None)
    return found if isinstance(found, Prompt) else None


def place_prompt(anatomy: Anatomy, method: str, settings: PromptConfig) -> list[Any]:
    """Give a model a new prompt that trains, in at least float32.

    P-tuning goes to the encoder of an encoder-decoder, prefix tuning to its decoder, as in PEFT.

    Args:
        anatomy: of the model, pruned or not; layers may differ in heads.
        method: "p_tuning" or "prefix_tuning".
        settings: of the prompt.

    Returns:
        Handles of the wrappers.

    Raises:
        ValueError: prefix tuning, of a model that takes no cache.
    """
    model = anatomy.model
    weight = _embeddings(anatomy.reader(anatomy.stacks[0])).weight
    prompt = _new_prompt(anatomy, method, settings)
    prompt = prompt.to(weight.device, torch.promote_types(weight.dtype, torch.float32))
    setattr(model, PROMPT, prompt.train(model.training))
    return _place(anatomy, prompt)


def place_plain_prompt(anatomy: Anatomy, method: str, num_virtual_tokens: int) -> None:
    """Give a model an empty place for a prompt without a network, as an export keeps it; the numbers follow."""
    settings = PromptConfig(num_virtual_tokens=num_virtual_tokens, mlp_layers=0, layer_norm=False)
    prompt = _new_prompt(anatomy, method, settings)
    setattr(anatomy.model, PROMPT, prompt)
    _place(anatomy, prompt)


def remove_prompt(model: nn.Module) -> None:
    """Take the prompt out of a model; its wrappers go by their handles."""
    delattr(model, PROMPT)


def _new_prompt(anatomy: Anatomy, method: str, settings: PromptConfig) -> Prompt:
    if method == "p_tuning":
        return PTuningEmbedding(
            settings.num_virtual_tokens,
            _embeddings(anatomy.reader(anatomy.stacks[0])).weight.shape[1],
            settings.hidden_dimension,
            settings.dropout_probability,
            mlp_layers=settings.mlp_layers,
            layer_norm=settings.layer_norm,
        )
    sizes = prefix_sizes(anatomy)
    return PrefixTuning(
        len(sizes),
        [heads for heads, _ in sizes],
        [size for _, size in sizes],
        settings.num_virtual_tokens,
        settings.dropout_probability,
        prefix_projection=settings.prefix_projection,
        hidden_dimension=settings.hidden_dimension,
    )


def _place(anatomy: Anatomy, prompt: Prompt) -> list[Any]:
    stacks = anatomy.stacks
    if isinstance(prompt, PrefixTuning):
        stack = stacks[-1]
        reader = anatomy.reader(stack)
        return [wrap(reader, FillCache(prompt, reader, decoder=stack.decoder), outside=True)]
    stack = stacks[0]
    reader = anatomy.reader(stack)
    read_first = not stack.decoder and type(anatomy.model).__name__.endswith(READ_FIRST)
    trims = len(stacks) == 1 and not read_first
    placed = [wrap(reader, InsertTokens(prompt, reader, decoder=stack.decoder, trims=trims), outside=True)]
    for behind in stacks[1:]:
        reader = anatomy.reader(behind)
        placed.append(wrap(reader, SeeTokens(prompt, reader, decoder=True), outside=True))
    return placed


def _embeddings(reader: Any) -> nn.Embedding:
    found = reader.get_input_embeddings()
    assert isinstance(found, nn.Embedding)
    return found


def prefix_sizes(anatomy: Anatomy) -> list[tuple[int, int]]:
    """Heads of keys and values, and the size of a head, of each layer that gets a prefix: 0 and 0 where none is left.

    Raises:
        ValueError: the stack takes no cache.
    """
    stack = anatomy.stacks[-1]
    reader = anatomy.reader(stack)
    takes_cache = "past_key_values" in inspect.signature(reader.forward).parameters
    if not takes_cache or not getattr(reader, "is_decoder", True):
        raise ValueError(
            f"patch_model: prefix tuning hands its keys and values over as a cache, and {type(reader).__name__} takes "
            f"none; use method='p_tuning'"
        )
    counts = anatomy.num_units()
    own = [part for part in anatomy.attentions if part.layer.stack == stack and part.table.units == "heads"]
    return [(counts[part.name], head_size(part.module) if counts[part.name] else 0) for part in own]
