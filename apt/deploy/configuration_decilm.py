"""The configuration of a DeciLM folder. A copy of this file lies in each: it imports nothing but transformers."""

from typing import Any

from transformers import PretrainedConfig


class Fields(dict):  # type: ignore[type-arg]
    """A JSON object whose entries are attributes too, as vLLM and SGLang read them."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(name)


class DeciLMConfig(PretrainedConfig):
    """Llama's settings, and for each layer which parts it has and how large they are."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs: Any = (), **settings: Any) -> None:
        blocks = [{part: Fields(fields) for part, fields in block.items()} for block in block_configs]
        self.block_configs = [Fields(block) for block in blocks]
        super().__init__(**settings)
