"""Prefix tuning: keys and values before those of the text, by way of the model's own cache."""

from typing import Any

import torch
from torch import Tensor, nn

from apt.layers.around import Call, by_name
from apt.methods.prompts.inputs import AroundStack
from apt.methods.prompts.modules import PrefixTuning


class FillCache(AroundStack):
    """An empty cache, the caller's or a new one, holds the prefixes before the layers run."""

    prompt: PrefixTuning

    def __init__(self, prompt: PrefixTuning, reader: nn.Module, *, decoder: bool) -> None:
        super().__init__(prompt, reader, decoder=decoder)
        self.layer = next((i for i, heads in enumerate(prompt.num_heads) if heads), 0)  # one that fills its cache

    def __call__(self, call: Call, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if module.training and any(getattr(part, "gradient_checkpointing", False) for part in module.modules()):
            raise ValueError(
                "prompts: gradient checkpointing takes the cache away, and the prefixes with it; call "
                "model.gradient_checkpointing_disable(), or use method='p_tuning'"
            )
        given = by_name(self.names, args, kwargs)
        text = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        assert isinstance(text, Tensor)
        cache = given.get("past_key_values")
        count = self.prompt.num_virtual_tokens
        config: Any = module.config
        wanted = config.use_cache if given.get("use_cache") is None else given["use_cache"]
        returns = cache is not None or (self.decoder and bool(wanted))
        past = self._past(given, text.shape[1])
        if not past:
            self._check_length(text.shape[1])
            cache = self._new_cache(config) if cache is None else cache
            self._fill(module, cache, len(text))
        positions = self._positions(module, given)
        if positions is not None:
            given["position_ids"] = positions
        if not self.decoder and given.get("attention_mask") is None:  # an encoder reads the number of places there
            given["attention_mask"] = torch.ones(text.shape[:2], dtype=torch.long, device=text.device)
        self._extend_mask(given)
        given["past_key_values"] = cache
        output = call(**given)
        self._check_read(cache, (past or count) + text.shape[1])
        if not returns and not isinstance(output, tuple):
            output.past_key_values = None
        return output

    def _new_cache(self, config: Any) -> Any:
        from transformers import DynamicCache, EncoderDecoderCache

        if not self.decoder:
            return DynamicCache()
        own = DynamicCache(config=config)
        return EncoderDecoderCache(own, DynamicCache(config=config)) if config.is_encoder_decoder else own

    def _fill(self, module: Any, cache: Any, batch_size: int) -> None:
        weight = module.get_input_embeddings().weight
        kind = weight.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        own = getattr(cache, "self_attention_cache", cache)
        for layer, (key, value) in enumerate(self.prompt()):
            if key.shape[1]:
                key, value = (
                    states.to(dtype).transpose(0, 1).expand(batch_size, -1, -1, -1) for states in (key, value)
                )
                own.update(key, value, layer)

    def _check_read(self, cache: Any, expected: int) -> None:
        found = int(cache.get_seq_length(self.layer))
        if found != expected:
            raise ValueError(
                f"prompts: the layers have read {found} of {expected} places of the cache, so the prefixes are "
                f"lost; this model takes no cache here, use method='p_tuning'"
            )
