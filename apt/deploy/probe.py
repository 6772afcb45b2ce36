"""Inputs on which a written model is compared with the model in torch, and what torch makes of them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

ROWS, LENGTH, TEXT = 2, 16, 32  # of the inputs; tokens of greedy text
BEGIN = 8  # tokens that greedy text goes on from


def inputs_of(model: Any, *, padded: bool = True) -> dict[str, Tensor]:
    """Token ids ``[2, 16]`` drawn with a seed, and their mask; of an encoder-decoder also what its decoder reads.

    Args:
        model: of transformers.
        padded: whether the second row ends in padding, for programs that know a mask.
    """
    draw = torch.Generator().manual_seed(0)
    most = model.config.get_text_config().vocab_size
    ids = torch.randint(3, most, (ROWS, LENGTH), generator=draw)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, LENGTH - 5 :] = 0
        ids[1, LENGTH - 5 :] = model.config.pad_token_id or 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.randint(3, most, (ROWS, LENGTH // 2), generator=draw)
    return inputs


@torch.inference_mode()
def logits_of(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """What torch makes of them: the logits, or the states of a model without a head; float32."""
    output = model(**inputs)
    found: Tensor = output.logits if hasattr(output, "logits") else output.last_hidden_state
    return found.float()


def difference(theirs: Tensor, ours: Tensor, mask: Tensor | None = None) -> float:
    """The largest difference over the largest number of ours; of tokens, where a mask says so, those that are real."""
    if mask is not None and ours.dim() == 3 and ours.shape[:2] == mask.shape:
        theirs, ours = theirs[mask.bool()], ours[mask.bool()]
    return float((theirs.float() - ours).abs().max() / ours.abs().max())


@torch.inference_mode()
def greedy(model: Any, inputs: Mapping[str, Tensor], tokens: int = TEXT) -> list[int]:
    """Greedy text of the first row, without what it begins with; an encoder-decoder reads the whole row.

    The end of a text does not end it, so that as many tokens are compared of every model.
    """
    if model.config.is_encoder_decoder:
        begin = {name: value[:1] for name, value in inputs.items() if name in ("input_ids", "attention_mask")}
        known = 1  # the start of the decoder
    else:
        begin = {"input_ids": inputs["input_ids"][:1, :BEGIN], "attention_mask": inputs["attention_mask"][:1, :BEGIN]}
        known = BEGIN
    made = model.generate(**begin, do_sample=False, num_beams=1, min_new_tokens=tokens, max_new_tokens=tokens)
    return [int(token) for token in made[0, known:]]
