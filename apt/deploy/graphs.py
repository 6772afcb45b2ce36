"""The graphs that a model is traced to, with the names that readers of such files know.

An encoder is one, and a decoder is one that goes on from keys and values, of no token at first. Behind an encoder a
decoder is two: the first computes the keys of what the encoder read, the second reads them.
"""

import contextlib
import copy
import inspect
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput
from transformers.pytorch_utils import Conv1D

from apt.deploy.probe import inputs_of
from apt.deploy.source import Source

READ, MORE = 5, 3  # tokens in the cache, and behind it, in what is traced: of length 1 an axis would be fixed
SIDE, LAYER = r"(?:(self|cross)_attention_cache\.)?", r"layers\.(\d+)\.(key|value)s"
CACHE = re.compile(rf"(?:(?:in|out)put\.)?past_key_values\.{SIDE}{LAYER}")
SIDES = {"self": "decoder.", "cross": "encoder.", None: ""}
BEHIND_AN_ENCODER = {
    "attention_mask": "encoder_attention_mask",
    "encoder_outputs.last_hidden_state": "encoder_hidden_states",
    "decoder_input_ids": "input_ids",
}
IDLE = "encoder_last_hidden_state"  # what a decoder answers of its input


@dataclass(frozen=True)
class Graph:
    """What is traced.

    Args:
        stem: of its file.
        module: called by keyword.
        inputs: what it is traced on; tensors, caches, and flags that stay as they are.
        renamed: names of inputs by the names of the call.
    """

    stem: str
    module: Any
    inputs: dict[str, Any]
    renamed: dict[str, str]

    def input_name(self, traced: str) -> str:
        return _cache_name(traced, "past_key_values") or self.renamed.get(traced, traced)

    def output_name(self, traced: str) -> str:
        return _cache_name(traced, "present") or traced


def _cache_name(traced: str, side: str) -> str | None:
    """As in ``past_key_values.0.key``, or ``present.0.encoder.key`` behind an encoder."""
    found = CACHE.fullmatch(traced)
    return f"{side}.{found[2]}.{SIDES[found[1]]}{found[3]}" if found else None


def why_no_graph(source: Source) -> str | None:
    """What a graph cannot say of a model: a prompt, which stands before the first tokens and not before later ones."""
    if source.card.get("prompt") is not None and source.generates:
        return "its prompt stands before the first tokens alone, and one graph reads first and later tokens alike"
    return None


def traceable(model: Any) -> tuple[Any, list[str]]:
    """The model in float32 and without products over nothing, and a note where its weights were in another type.

    OpenVINO's CPU plugin refuses a product whose inner size is 0, where a layer lost all its neurons, or gives wrong
    numbers where there is no bias. What is left of such a linear is its bias.
    """
    kinds = {str(value.dtype).removeprefix("torch.") for value in model.parameters() if value.is_floating_point()}
    notes = [] if kinds == {"float32"} else [f"weights in {', '.join(sorted(kinds))} are written as float32"]
    empty = [name for name, module in model.named_modules() if _reads_nothing(module)]
    if not notes and not empty:
        return model, notes
    model = copy.deepcopy(model).float()
    for name in empty:
        linear = model.get_submodule(name)
        linear.forward = partial(_bias_alone, linear)
    return model, notes


def _reads_nothing(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D) and _sizes(module)[0] == 0


def _sizes(linear: nn.Linear | Conv1D) -> tuple[int, int]:
    """Inputs and outputs."""
    rows, columns = linear.weight.shape
    return (columns, rows) if isinstance(linear, nn.Linear) else (rows, columns)


def _bias_alone(linear: nn.Linear | Conv1D, x: Tensor) -> Tensor:
    answer = x.new_zeros(*x.shape[:-1], _sizes(linear)[1])
    return answer if linear.bias is None else answer + linear.bias


def call_inputs(model: Any) -> dict[str, Tensor]:
    """The inputs of the probe, with segments where the family tells them apart."""
    inputs = inputs_of(model)
    if _takes(model, "token_type_ids") and getattr(model.config, "type_vocab_size", 0) > 1:
        inputs["token_type_ids"] = torch.arange(inputs["input_ids"].shape[1]).ge(READ).long().repeat(2, 1)
    return inputs


def graphs_of(model: Any) -> list[Graph]:
    """What has to be traced of a model, in float32.

    Args:
        model: of transformers, in evaluation mode.
    """
    inputs: dict[str, Any] = dict(call_inputs(model))
    if not model.can_generate():
        flags = {"use_cache": False} if _takes(model, "use_cache") or hasattr(model.config, "use_cache") else {}
        return [Graph("model", model, inputs | flags, {})]
    if model.config.is_encoder_decoder:
        return _encoder_decoder(model, inputs)
    return [Graph("model", model, _going_on(model, inputs), {})]


@torch.no_grad()
def _going_on(model: Any, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """A decoder behind a few tokens. Its cache keeps all of them in every layer: a window is in the mask."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    cache = DynamicCache()
    model(input_ids=ids[:, :READ], attention_mask=mask[:, :READ], past_key_values=cache, use_cache=True)
    end = READ + MORE
    further = {"input_ids": ids[:, READ:end].clone(), "attention_mask": mask[:, :end].clone()}
    if _takes(model, "position_ids"):
        further["position_ids"] = torch.arange(READ, end).repeat(len(ids), 1)
    return further | {"past_key_values": cache, "use_cache": True}


@torch.no_grad()
def _encoder_decoder(model: Any, inputs: dict[str, Tensor]) -> list[Graph]:
    """The encoder; the decoder at its first tokens; the decoder behind them."""
    mask, words = inputs["attention_mask"], inputs["decoder_input_ids"]
    encoder = model.get_encoder()
    read = {"input_ids": inputs["input_ids"], "attention_mask": mask}
    states = encoder(**read).last_hidden_state
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    begin = {"encoder_outputs": BaseModelOutput(states), "attention_mask": mask, "use_cache": True}
    model(**begin, decoder_input_ids=words[:, :READ], past_key_values=cache)
    first = {**begin, "decoder_input_ids": words[:, :READ].clone()}
    behind = {**begin, "decoder_input_ids": words[:, READ : READ + MORE].clone(), "past_key_values": cache}
    return [
        Graph("encoder_model", encoder, read, {}),
        Graph("decoder_model", model, first, BEHIND_AN_ENCODER),
        Graph("decoder_with_past_model", model, behind, BEHIND_AN_ENCODER),
    ]


def _takes(model: Any, name: str) -> bool:
    return name in inspect.signature(model.forward).parameters


def traced(graph: Graph, exporter: Callable[[], Any], config: Any) -> Any:
    """The program that an exporter of transformers makes of a graph.

    Args:
        graph: one of `graphs_of`.
        exporter: its class.
        config: of that class.

    Raises:
        ValueError: torch or the exporter cannot say the module.
    """
    try:
        with _quiet():
            return exporter().export(graph.module, copy.deepcopy(graph.inputs), config).program
    except RuntimeError as error:
        last = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise ValueError(f"export: {type(graph.module).__name__} cannot be traced: {last[0]}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the lines of progress and the guesses about versions of what traces."""
    level = transformers.logging.get_verbosity()
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "torch._export", "nncf", "root")]
    before = [one.level for one in loggers]
    transformers.logging.set_verbosity_error()
    try:
        for one in loggers:
            one.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(level)
        for one, was in zip(loggers, before, strict=True):
            one.setLevel(was)
