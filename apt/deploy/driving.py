"""Runs graphs with numpy alone, as a program without torch would, beside the model in torch."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from apt.deploy.formats import Comparison
from apt.deploy.graphs import call_inputs
from apt.deploy.probe import BEGIN, TEXT, difference, greedy, logits_of

Arrays = dict[str, NDArray[Any]]
Run = Callable[[str, Mapping[str, NDArray[Any]]], Arrays]  # the stem of a graph and its inputs, to its outputs


class Decoder:
    """A decoder that goes on from what it read.

    Args:
        run: the graphs; a graph is given what it knows of the inputs, and no token's keys where there are none yet.
        stem: of the graph that reads the first tokens.
        behind: of the graph that goes on, where it is another.
        given: what every call reads.
    """

    def __init__(self, run: Run, stem: str = "model", behind: str | None = None, given: Arrays | None = None) -> None:
        self.run = run
        self.stem = stem
        self.behind = behind or stem
        self.given = given or {}
        self.past: Arrays = {}
        self.read = 0

    def __call__(self, ids: NDArray[Any], mask: NDArray[Any] | None = None) -> NDArray[Any]:
        """Logits of further tokens ``[B, L]``; the mask ``[B, all]`` is of those that were read too."""
        end = self.read + ids.shape[1]
        feed = {
            "input_ids": ids,
            "attention_mask": np.ones((len(ids), end), np.int64) if mask is None else mask,
            "position_ids": np.arange(self.read, end)[None].repeat(len(ids), 0),
            "beam_idx": np.arange(len(ids), dtype=np.int32),
        }
        made = self.run(self.behind if self.read else self.stem, feed | self.given | self.past)
        present = {name: value for name, value in made.items() if name.startswith("present.")}
        self.past |= {name.replace("present", "past_key_values", 1): value for name, value in present.items()}
        self.read = end
        return made["logits"]


def greedy_text(decoder: Decoder, ids: NDArray[Any], tokens: int = TEXT) -> list[int]:
    """The likeliest tokens behind ``[1, L]``, one by one."""
    text: list[int] = []
    for _ in range(tokens):
        text.append(int(decoder(ids)[0, -1].argmax()))
        ids = np.array([text[-1:]])
    return text


def compare_graphs(program: str, open_run: Callable[[], Run], model: Any) -> Comparison:
    """Logits, a second half of the tokens through the cache, and greedy text.

    Args:
        program: its name and version.
        open_run: the graphs, with no token read.
        model: in torch.
    """
    inputs = call_inputs(model)
    arrays = {name: value.numpy() for name, value in inputs.items()}
    generates = model.can_generate()
    found = _in_two(decoder_of(open_run(), model, arrays), model, arrays) if generates else _at_once(open_run(), arrays)
    mask = None if model.config.is_encoder_decoder else inputs["attention_mask"]
    off = difference(torch.from_numpy(found), logits_of(model, inputs), mask)
    if not generates:
        return Comparison(program, off)
    alone = {name: value[:1] for name, value in arrays.items()}
    start = alone["input_ids"][:, :BEGIN]
    if model.config.is_encoder_decoder:
        start = np.array([[model.generation_config.decoder_start_token_id]])
    text = greedy_text(decoder_of(open_run(), model, alone), start)
    return Comparison(program, off, text == greedy(model, inputs))


def decoder_of(run: Run, model: Any, inputs: Arrays) -> Decoder:
    """A decoder that has read nothing; behind an encoder, what the encoder made of the inputs is given to it."""
    if not model.config.is_encoder_decoder:
        return Decoder(run)
    read = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    states = run("encoder_model", read)["last_hidden_state"]
    given = {"encoder_hidden_states": states, "encoder_attention_mask": read["attention_mask"]}
    return Decoder(run, "decoder_model", "decoder_with_past_model", given)


def _in_two(decoder: Decoder, model: Any, inputs: Arrays) -> NDArray[Any]:
    behind = model.config.is_encoder_decoder
    ids = inputs["decoder_input_ids" if behind else "input_ids"]
    half = ids.shape[1] // 2
    mask = np.ones_like(ids) if behind else inputs["attention_mask"]
    parts = [decoder(ids[:, :half], mask[:, :half]), decoder(ids[:, half:], mask)]
    return np.concatenate(parts, axis=1)


def _at_once(run: Run, inputs: Arrays) -> NDArray[Any]:
    made = run("model", inputs)
    return made["logits"] if "logits" in made else made["last_hidden_state"]
