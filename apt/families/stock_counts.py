"""How many heads a stock configuration can say that every layer has."""

import copy
from typing import Any

from apt.families.anatomy import PlacedPart, head_size

SAME_ARITHMETIC = {"llama": "mistral"}  # where one configuration refuses a count of heads, the other takes it


def sayable_heads(part: PlacedPart) -> tuple[int, ...]:
    """Counts of heads (of KV groups) that its stock configuration can say, up to those it has now, ascending.

    A configuration that derives the size of a head from their number, or a family whose layers must know which heads
    are left (T5), can say none but that of the model as it came; where some went before, none can be said, and any will
    do. Others check what they are told: Gemma takes counts that divide the
    hidden size.

    Args:
        part: an attention of a model.
    """
    now = part.num_units
    table = part.attention
    config: Any = part.layer.model.config
    if table.follow is not None or not table.settings:
        return (now,) if now == config.num_attention_heads else tuple(range(1, now + 1))
    if as_mistral(config) is not None:
        return tuple(range(1, now + 1))
    found = [count for count in range(1, now + 1) if with_heads(config, part, count) is not None]
    return tuple(found) if now in found else (*found, now)


def with_heads(config: Any, part: PlacedPart, count: int) -> Any:
    """A copy of a configuration with so many heads in each layer; None where it refuses that."""
    from huggingface_hub.errors import StrictDataclassError

    said = copy.deepcopy(config)
    before = getattr(config, part.attention.settings[-1])
    said.head_dim = head_size(part.module)
    for setting in part.attention.settings:
        setattr(said, setting, getattr(config, setting) * count // before)
    try:
        type(config).from_dict(said.to_dict())  # which is where a config checks its numbers
    except (ValueError, StrictDataclassError):
        return None
    return said


def as_mistral(config: Any) -> Any:
    """A configuration of Mistral that describes a Llama: the same arithmetic, and no rule for the count of heads.

    None of another model, and of a Llama with biases, which Mistral has not.
    """
    if config.model_type not in SAME_ARITHMETIC or config.attention_bias or config.mlp_bias:
        return None
    from transformers import MistralConfig

    said = {key: value for key, value in config.to_dict().items() if key not in ("model_type", "architectures")}
    return MistralConfig.from_dict(said | {"sliding_window": None})
