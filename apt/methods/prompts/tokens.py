"""P-tuning: virtual tokens before the text."""

from typing import Any

import torch
from torch import Tensor, nn

from apt.layers.around import Call, by_name
from apt.methods.prompts.inputs import AroundStack
from apt.methods.prompts.modules import PTuningEmbedding


class InsertTokens(AroundStack):
    """Virtual tokens before the embedded text; what the stack makes of them is dropped again.

    Args:
        trims: whether it is dropped. A decoder of T5 reads it, and the classifier of an encoder reads the first place,
            the first virtual token's, as it does in PEFT.
    """

    def __init__(self, prompt: PTuningEmbedding, reader: nn.Module, *, decoder: bool, trims: bool) -> None:
        super().__init__(prompt, reader, decoder=decoder)
        self.trims = trims

    def __call__(self, call: Call, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = by_name(self.names, args, kwargs)
        text = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        assert isinstance(text, Tensor)
        inserts = not self._past(given, text.shape[1])
        positions = self._positions(module, given)
        if inserts:
            self._check_length(text.shape[1])
            self._insert(module, given)
            if positions is not None:
                ours = torch.arange(self.prompt.num_virtual_tokens, device=text.device) + self.first
                positions = torch.cat([ours.expand(len(positions), -1), positions], dim=1)
        if positions is not None:
            given["position_ids"] = positions
        self._extend_mask(given)
        output = call(**given)
        return self._trimmed(output) if inserts and self.trims else output

    def _insert(self, module: Any, given: dict[str, Any]) -> None:
        ids, embeds = given.pop("input_ids", None), given.pop("inputs_embeds", None)
        embeds = module.get_input_embeddings()(ids) if embeds is None else embeds
        prompt = self.prompt(len(embeds)).to(embeds.dtype)
        given["inputs_embeds"] = torch.cat([prompt, embeds], dim=1)
        types = given.get("token_type_ids")
        if types is not None:
            given["token_type_ids"] = torch.cat([types.new_zeros(len(types), prompt.shape[1]), types], dim=1)

    def _trimmed(self, output: Any) -> Any:
        count = self.prompt.num_virtual_tokens
        if isinstance(output, tuple):
            return (output[0][:, count:], *output[1:])
        output.last_hidden_state = output.last_hidden_state[:, count:]
        if getattr(output, "hidden_states", None) is not None:
            output.hidden_states = tuple(states[:, count:] for states in output.hidden_states)
        return output


class SeeTokens(AroundStack):
    """The decoder that reads an encoder with virtual tokens: its mask over the encoder's places covers them too."""

    def __call__(self, call: Call, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = by_name(self.names, args, kwargs)
        self._extend_mask(given, "encoder_attention_mask")
        return call(**given)
