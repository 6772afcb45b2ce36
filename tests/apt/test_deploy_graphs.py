"""What is traced of a model, without tracing it: its numbers in float32, names of inputs and outputs, refusals."""

from pathlib import Path
from typing import Any

import pytest
import torch
from exported import free_export
from tiny_models import fill_adapters, tiny_model
from torch import nn
from transformers.pytorch_utils import Conv1D

import apt
from apt.deploy.graphs import Graph, call_inputs, graphs_of, traceable, why_no_graph
from apt.deploy.probe import logits_of
from apt.deploy.source import Source


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama_gqa", "t5_gated"])
def test_what_is_left_of_a_projection_from_nothing_is_its_bias(name: str, tmp_path: Path) -> None:
    model = apt.load_model(free_export(name, tmp_path / "model"))
    plain, notes = traceable(model)
    changed = [module for module in plain.modules() if "forward" in vars(module)]
    assert changed
    assert all(isinstance(module, nn.Linear | Conv1D) and 0 in module.weight.shape for module in changed)
    assert not notes
    inputs = call_inputs(model)
    assert torch.equal(logits_of(plain, inputs), logits_of(model, inputs))


def test_weights_in_sixteen_bits_become_float32_and_it_is_said() -> None:
    model = tiny_model("bert", torch.bfloat16)
    plain, notes = traceable(model)
    assert notes == ["weights in bfloat16 are written as float32"]
    assert {value.dtype for value in plain.parameters()} == {torch.float32}
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("stems", "name"),
    [(["model"], "bert"), (["model"], "gpt2"), (["encoder_model", "decoder_model", "decoder_with_past_model"], "t5")],
)
def test_files_and_what_they_are_traced_on(stems: list[str], name: str) -> None:
    model: Any = tiny_model(name, torch.float32)
    graphs = graphs_of(model)
    assert [graph.stem for graph in graphs] == stems
    assert ("past_key_values" in graphs[-1].inputs) == (name != "bert")
    assert ("token_type_ids" in graphs[0].inputs) == (name == "bert")


@pytest.mark.parametrize(
    ("traced", "read", "made"),
    [
        ("input_ids", "input_ids", "input_ids"),
        ("input.past_key_values.layers.3.keys", "past_key_values.3.key", "present.3.key"),
        ("past_key_values.layers.3.values", "past_key_values.3.value", "present.3.value"),
        (
            "past_key_values.cross_attention_cache.layers.0.keys",
            "past_key_values.0.encoder.key",
            "present.0.encoder.key",
        ),
    ],
)
def test_keys_and_values_have_the_names_that_readers_know(traced: str, read: str, made: str) -> None:
    graph = Graph("model", None, {}, {"attention_mask": "encoder_attention_mask"})
    assert (graph.input_name(traced), graph.output_name(traced)) == (read, made)
    assert graph.input_name("attention_mask") == "encoder_attention_mask"


@pytest.mark.parametrize(("name", "refused"), [("llama_gqa", True), ("bert", False)])
def test_a_prompt_before_the_first_tokens_alone_is_refused(name: str, refused: bool, tmp_path: Path) -> None:
    model = apt.patch_model(tiny_model(name, torch.float32), method="p_tuning")
    made = apt.export_model(fill_adapters(model), tmp_path / "model")
    reason = why_no_graph(Source(name, made))
    assert (reason is not None and reason.startswith("its prompt stands before")) == refused
