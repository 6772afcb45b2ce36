"""What the ways of a prompt into a model share: arguments by name, padding mask, positions. No forward is copied.

They stand around the call of the module that embeds the tokens of a stack, whoever calls it. The positions and masks
that come in are those of the text; the P places of the prompt are added here.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from apt.layers.around import Call, arguments
from apt.methods.prompts.modules import PrefixTuning, PTuningEmbedding

NUMBERINGS = ("create_position_ids_from_input_ids", "create_position_ids_from_inputs_embeds")  # of RoBERTa's embeddings
TABLES = ("position_embeddings", "wpe", "embed_positions")  # what learned positions are called


class AroundStack:
    """What all ways have in common: arguments by name, padding mask, positions.

    Args:
        prompt: what trains.
        reader: the module that embeds the tokens of the stack.
        decoder: whether the stack is one, which numbers its own positions from cache and mask.
    """

    def __init__(self, prompt: PTuningEmbedding | PrefixTuning, reader: nn.Module, *, decoder: bool) -> None:
        self.prompt: Any = prompt
        self.decoder = decoder
        self.names = arguments(reader)
        self.first = _first_position(reader)
        self.limit = _num_positions(reader)

    def __call__(self, call: Call, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("each way has its own")

    def _past(self, given: Mapping[str, Any], length: int) -> int:
        """Places that the cache holds, those of the prompt among them; 0 before the first call.

        Raises:
            ValueError: the cache has a fixed length, or mask and positions do not count cache and text together.
        """
        cache, mask, positions = (given.get(name) for name in ("past_key_values", "attention_mask", "position_ids"))
        if cache is None:
            return 0
        if getattr(cache, "is_compileable", False):
            raise ValueError("prompts: a static cache has no room for virtual tokens; use a dynamic one, the default")
        past = int(cache.get_seq_length())
        tokens = past - self.prompt.num_virtual_tokens if past else 0
        wrong = isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] != tokens + length
        if past and mask is None and positions is not None and getattr(cache, "_is_user_defined", False):
            wrong = int(positions[0, 0]) != tokens  # generate leaves out a mask of ones
        if wrong:
            raise ValueError(
                f"prompts: mask or positions do not fit {length} new after {tokens} cached ones; generate counts "
                f"the virtual tokens of a cache that is used again as text: give it the new tokens alone, with the "
                f"mask of all, or no cache"
            )
        return past

    def _extend_mask(self, given: dict[str, Any], name: str = "attention_mask") -> None:
        """Let the prompt be seen by every token."""
        mask = given.get(name)
        if mask is None:
            return
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            raise ValueError(f"prompts: {name} must be [B, T], one entry a token; masks of single pairs cannot be used")
        given[name] = torch.cat([mask.new_ones(len(mask), self.prompt.num_virtual_tokens), mask], dim=1)

    def _positions(self, module: Any, given: dict[str, Any]) -> Tensor | None:
        """Positions of the text behind the prompt, ``[1 or B, T]``; None where the stack numbers them right itself."""
        if "position_ids" not in self.names:
            return None
        positions: Tensor | None = given.get("position_ids")
        if positions is None and self.decoder:
            return None
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        if positions is None:
            by_ids, by_embeds = (getattr(module.embeddings, name, None) for name in NUMBERINGS)
            if by_ids is not None and ids is not None:
                positions = by_ids(ids, module.embeddings.padding_idx)
            elif by_embeds is not None and embeds is not None:
                positions = by_embeds(embeds, module.embeddings.padding_idx)
            else:
                text = ids if ids is not None else embeds
                assert text is not None
                positions = torch.arange(text.shape[1], device=text.device).unsqueeze(0)
        return positions + self.prompt.num_virtual_tokens

    def _check_length(self, length: int) -> None:
        if self.limit is not None and self.prompt.num_virtual_tokens + length > self.limit:
            count = self.prompt.num_virtual_tokens
            raise ValueError(
                f"prompts: {count} virtual tokens and {length} of text are more than the {self.limit} positions of "
                f"this model; cut the text to {max(0, self.limit - count)} tokens"
            )


def _position_table(reader: nn.Module) -> Any:
    named = ((name.rpartition(".")[2], module) for name, module in reader.named_modules())
    return next((m for name, m in named if name in TABLES and isinstance(m, nn.Embedding)), None)


def _first_position(reader: nn.Module) -> int:
    """The position of a first token: RoBERTa counts from behind that of padding."""
    padding = getattr(_position_table(reader), "padding_idx", None)
    return 0 if padding is None else int(padding) + 1


def _num_positions(reader: nn.Module) -> int | None:
    """Tokens that learned positions are there for; None where there is no such table."""
    table = _position_table(reader)
    return None if table is None else table.num_embeddings - getattr(table, "offset", 0) - _first_position(reader)
