"""P-tuning and prefix tuning: virtual tokens before the text, or keys and values before those of every layer."""

from apt.methods.prompts.config import PromptConfig
from apt.methods.prompts.modules import PrefixTuning, PTuningEmbedding
from apt.methods.prompts.place import (
    PROMPT,
    place_plain_prompt,
    place_prompt,
    placed_prompt,
    prefix_sizes,
    remove_prompt,
)

__all__ = [
    "PROMPT",
    "PTuningEmbedding",
    "PrefixTuning",
    "PromptConfig",
    "place_plain_prompt",
    "place_prompt",
    "placed_prompt",
    "prefix_sizes",
    "remove_prompt",
]
