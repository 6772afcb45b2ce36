"""Layers of different sizes padded with zeros to one stock shape: `AutoModel` alone, and the same function."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import free_export
from tiny_models import MODELS, NAMES, fill_adapters, random_plan, tiny_model

import apt
from apt.cli import main
from apt.deploy.hf import stock_model
from apt.deploy.padded import padded_model, padding_notes
from apt.deploy.probe import difference, greedy, inputs_of, logits_of
from apt.families import anatomy_of
from apt.surgery.prune import apply_prune_plan


@pytest.mark.parametrize("name", NAMES)
def test_the_stock_class_computes_the_same_from_a_padded_folder(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    free_export(name, tmp_path / "free")
    ours: Any = apt.load_model(tmp_path / "free")
    with pytest.raises((RuntimeError, ValueError)):
        stock_model(tmp_path / "free")
    assert main(["export", str(tmp_path / "free"), "--to", "hf-uniform", "--out", str(tmp_path / "hf")]) == 0
    assert not (tmp_path / "hf/apt_export.json").exists()
    theirs = stock_model(tmp_path / "hf")
    # Three heads of a width of 32 are no Llama; a Mistral computes the same, where there are no biases.
    written = MODELS[name].model if name == "llama_bias" else MODELS[name].model.replace("Llama", "Mistral")
    assert type(theirs).__name__ == written
    inputs = inputs_of(ours)
    assert difference(logits_of(theirs, inputs), logits_of(ours, inputs), inputs["attention_mask"]) < 1e-5
    if ours.can_generate():
        assert greedy(theirs, inputs) == greedy(ours, inputs)
    notes = json.loads((tmp_path / "hf/apt_deploy.json").read_text())["notes"]
    assert notes == padding_notes(anatomy_of(ours), anatomy_of(theirs))
    assert all(note in capsys.readouterr().err for note in notes[:1])


@pytest.mark.parametrize(
    ("name", "heads", "neurons"), [("qwen2", 3, 22), ("llama_gqa", 3, 22), ("llama_bias", 4, 22), ("t5", 4, 26)]
)
def test_the_shape_is_the_least_that_a_configuration_says(name: str, heads: int, neurons: int, tmp_path: Path) -> None:
    """Layers of at most 3 KV groups of 2 heads: where a Llama has biases, its heads have to divide the width of 32."""
    free_export(name, tmp_path / "free")
    anatomy = anatomy_of(apt.load_model(tmp_path / "free"))
    units = anatomy_of(padded_model(anatomy)).num_units()
    assert {count for name, count in units.items() if name.endswith("heads")} == {heads}
    assert {count for name, count in units.items() if name.endswith("neurons")} == {neurons}


def test_a_program_may_ask_for_more_of_a_kind(tmp_path: Path) -> None:
    free_export("qwen2", tmp_path / "free")
    ours: Any = apt.load_model(tmp_path / "free")
    theirs = padded_model(anatomy_of(ours), least={"head": 4, "neuron": 40})
    assert (theirs.config.num_key_value_heads, theirs.config.intermediate_size) == (4, 40)
    inputs = inputs_of(ours)
    assert difference(logits_of(theirs, inputs), logits_of(ours, inputs), inputs["attention_mask"]) < 1e-5


@pytest.mark.parametrize("name", ["qwen3", "phi3"])
def test_a_narrower_stream_stays_narrow(name: str, tmp_path: Path) -> None:
    model = fill_adapters(apt.patch_model(tiny_model(name, torch.float32), unit_types=("head", "neuron", "hidden")))
    apply_prune_plan(model, random_plan(model, hidden=True, seed=1))
    apt.export_model(model, tmp_path / "free")
    assert main(["export", str(tmp_path / "free"), "--to", "hf-uniform", "--out", str(tmp_path / "hf"), "--check"]) == 0
    theirs, ours = stock_model(tmp_path / "hf"), apt.load_model(tmp_path / "free")
    assert theirs.config.hidden_size < tiny_model(name).config.hidden_size
    inputs = inputs_of(ours)
    assert difference(logits_of(theirs, inputs), logits_of(ours, inputs), inputs["attention_mask"]) < 1e-5


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("bert", "BertConfig derives the size of a head from the hidden size"),
        ("gemma3", "Gemma3TextConfig derives the scale of the embeddings from the hidden size"),
        ("llama_bias", "The hidden size (27) is not a multiple of the number of attention heads"),
    ],
)
def test_what_no_padding_mends_is_said(
    name: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = apt.patch_model(tiny_model(name, torch.float32), unit_types=("head", "neuron", "hidden"))
    apply_prune_plan(model, random_plan(model, hidden=True, seed=1))
    apt.export_model(model, tmp_path / "free")
    assert main(["export", str(tmp_path / "free"), "--to", "hf-uniform", "--out", str(tmp_path / "hf")]) == 2
    told = capsys.readouterr().err
    assert "hf-uniform cannot say" in told
    assert words in told
    assert not (tmp_path / "hf").exists()


def test_gates_that_depend_on_the_example_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = apt.patch_model(tiny_model("llama_gqa", torch.float32), method="dynacsg")
    apt.export_model(model, tmp_path / "gated")
    assert main(["export", str(tmp_path / "gated"), "--to", "hf-uniform", "--out", str(tmp_path / "hf")]) == 2
    assert "it has gates that depend on the example" in capsys.readouterr().err
