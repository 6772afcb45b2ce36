"""Folders for vLLM: DeciLM's rules, the same numbers, and what is padded or refused. `run_in_vllm.py` runs vLLM."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from deci_rules import check_rules, config_of, in_llama_layers
from exported import free_export, sized_export, uniform_export

import apt
from apt.cli import main
from apt.deploy.hf import stock_model
from apt.deploy.probe import difference, greedy, inputs_of, logits_of

HEADS, NEURONS = (4, 3, 0, 2, 1), (40, 13, 25, 0, 8)
NO_WINDOW = {"sliding_window": None}
SCALED = {"rope_type": "linear", "rope_theta": 3000.0, "factor": 2.0}


def written(source: Path, folder: Path) -> list[str]:
    """Write for vLLM; the notes."""
    assert main(["export", str(source), "--to", "vllm", "--out", str(folder)]) == 0
    notes: list[str] = json.loads((folder / "apt_deploy.json").read_text())["notes"]
    return notes


def check_same(theirs: Any, ours: Any) -> None:
    inputs = inputs_of(ours)
    assert difference(logits_of(theirs, inputs), logits_of(ours, inputs), inputs["attention_mask"]) < 1e-5
    assert greedy(theirs, inputs) == greedy(ours, inputs)


@pytest.mark.parametrize("name", ["llama", "llama_gqa", "mistral"])
def test_layers_that_differ_become_a_decilm(name: str, tmp_path: Path) -> None:
    window = NO_WINDOW if name == "mistral" else {}
    sized_export(name, tmp_path / "free", HEADS, NEURONS, rope_parameters=SCALED, **window)
    notes = written(tmp_path / "free", tmp_path / "vllm")
    check_rules(tmp_path / "vllm")
    check_same(in_llama_layers(tmp_path / "vllm"), apt.load_model(tmp_path / "free"))
    heads, group = (4, 1) if name == "llama" else (8, 2)
    assert notes == [
        f"{4 * heads - 10 * group} of {4 * heads} query heads are padding: zeros",
        "1 of 11 KV heads are padding: zeros",
        "load it with trust_remote_code: its configuration is a class",
    ]


def test_its_configuration_needs_transformers_alone(tmp_path: Path) -> None:
    from transformers import AutoConfig

    sized_export("llama_gqa", tmp_path / "free", HEADS, NEURONS)
    written(tmp_path / "free", tmp_path / "vllm")
    assert "apt" not in (tmp_path / "vllm/configuration_decilm.py").read_text().replace("attributes", "")
    config = AutoConfig.from_pretrained(tmp_path / "vllm", trust_remote_code=True)
    blocks = config.block_configs
    assert [block.attention.no_op for block in blocks] == [False, False, True, False, False]
    assert [block.ffn.no_op for block in blocks] == [False, False, False, True, False]
    there = [block.attention for block in blocks if not block.attention.no_op]
    assert [config.num_attention_heads // attention.n_heads_in_group for attention in there] == [4, 4, 2, 1]
    assert [block.ffn.intermediate_size for block in blocks if not block.ffn.no_op] == [40, 13, 25, 8]
    assert not hasattr(blocks[0].ffn, "ffn_mult")
    assert json.loads(config.to_json_string())["block_configs"] == config_of(tmp_path / "vllm")["block_configs"]


def test_a_first_layer_without_heads_keeps_one_of_zeros(tmp_path: Path) -> None:
    """vLLM begins the residual stream in the first attention. No run leaves that empty, but a hand may."""
    from apt.deploy.deci import deci_sizes, write_deci
    from apt.families import anatomy_of

    ours: Any = apt.load_model(sized_export("llama_gqa", tmp_path / "free", (2, 2), (8, 8)))
    anatomy = anatomy_of(ours)
    table = anatomy.attentions[0].attention
    table.remove(anatomy.layers[0].module)
    sizes = deci_sizes(anatomy)
    assert sizes is not None
    (tmp_path / "vllm").mkdir()
    write_deci(anatomy, sizes, tmp_path / "vllm")
    check_rules(tmp_path / "vllm")
    inputs = inputs_of(ours)
    assert difference(logits_of(in_llama_layers(tmp_path / "vllm"), inputs), logits_of(ours, inputs)) < 1e-5


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("llama_bias", "padded to one shape, as for DeciLM an output bias"),
        ("mistral", "padded to one shape, as for DeciLM it has no sliding window, and this model one of 4 tokens"),
        ("qwen2", "padded to one shape, as for DeciLM Qwen2ForCausalLM has other layers than a Llama"),
        ("gpt2", "padded to one shape, as for DeciLM GPT2LMHeadModel has other layers than a Llama"),
    ],
)
def test_other_layers_are_padded_to_one_shape(name: str, words: str, tmp_path: Path) -> None:
    plain = {"scale_attn_by_inverse_layer_idx": False} if name == "gpt2" else {}
    free_export(name, tmp_path / "free", **plain)
    notes = written(tmp_path / "free", tmp_path / "vllm")
    assert notes[0].startswith(words)
    assert "heads (KV groups) are padding" in notes[1]
    theirs = stock_model(tmp_path / "vllm")
    check_same(theirs, apt.load_model(tmp_path / "free"))
    if name == "qwen2":  # vLLM's Qwen2 takes hidden size / heads for the size of a head
        assert theirs.config.num_attention_heads == 8


def test_a_uniform_export_is_copied(tmp_path: Path) -> None:
    uniform_export("llama_gqa", tmp_path / "uniform")
    assert written(tmp_path / "uniform", tmp_path / "vllm") == []
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "vllm" / name).read_bytes() == (tmp_path / "uniform" / name).read_bytes()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("t5", "of T5ForConditionalGeneration nothing was run in vLLM"),
        ("bert", "of BertForSequenceClassification nothing was run in vLLM"),
        ("gpt2", "vLLM's gpt2 has no scale_attn_by_inverse_layer_idx"),
        ("qwen2_mixed", "vLLM's qwen2 has a sliding window in all layers or in none"),
    ],
)
def test_what_vllm_cannot_say(name: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    free_export(name, tmp_path / "free")
    assert main(["export", str(tmp_path / "free"), "--to", "vllm", "--out", str(tmp_path / "vllm")]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "vllm").exists()


def test_a_size_of_head_that_is_not_derived_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    free_export("qwen2", tmp_path / "free", head_dim=16)
    assert main(["export", str(tmp_path / "free"), "--to", "vllm", "--out", str(tmp_path / "vllm")]) == 2
    assert "vLLM's qwen2 takes the hidden size over the number of heads" in capsys.readouterr().err


def test_half_precision_stays(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    sized_export("llama_gqa", tmp_path / "free", (4, 0, 1), (16, 16, 16), torch.bfloat16)
    written(tmp_path / "free", tmp_path / "vllm")
    assert config_of(tmp_path / "vllm")["dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in load_file(tmp_path / "vllm/model.safetensors").values()} == {torch.bfloat16}
