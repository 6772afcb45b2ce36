"""Folders for mlx-lm, run in it where it is installed; and what SGLang asks of the same folder."""

import json
from pathlib import Path
from typing import Any

import pytest
from deci_rules import check_rules, config_of, in_llama_layers, width_by_mult
from exported import free_export, sized_export, uniform_export

import apt
from apt.cli import main
from apt.deploy import mlx
from apt.deploy.hf import stock_model
from apt.deploy.probe import difference, inputs_of, logits_of
from apt.deploy.source import opened

FAR = {"rope_type": "default", "rope_theta": 300.0}
SCALED = {
    **{"rope_type": "llama3", "rope_theta": 300.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 16,
}
GEMMA3 = {"full_attention": FAR, "sliding_attention": {**FAR, "rope_theta": 50.0}}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"rope_parameters": FAR}),
    ("llama_gqa", {"rope_parameters": SCALED}),
    ("llama_bias", {"rope_parameters": SCALED}),
    ("mistral", {"rope_parameters": FAR, "sliding_window": None}),
    ("qwen2", {"rope_parameters": FAR}),
    ("qwen3", {"rope_parameters": FAR}),
    ("phi3", {"rope_parameters": {**FAR, "partial_rotary_factor": 0.5}}),
    ("gemma2", {"rope_parameters": FAR, "sliding_window": 64, "attn_logit_softcapping": 2.0}),
    ("gemma3", {"rope_parameters": GEMMA3}),
]
every_case = pytest.mark.parametrize(("name", "settings"), CASES, ids=[name for name, _ in CASES])
ROUNDED = {"gemma3": 2e-4}  # mlx-lm rounds the scale of its embeddings to bfloat16


def checked(name: str, source: Path, folder: Path) -> None:
    """Write for mlx-lm, run there, and compare."""
    folder.mkdir()
    with opened(source) as found:
        assert mlx.refuse(found) is None
        mlx.write(found, folder, None)
        compared = mlx.compare(found, folder, None)
    assert compared.difference is not None
    assert compared.difference < ROUNDED.get(name, 1e-5)
    assert compared.same_text


@every_case
def test_mlx_lm_computes_the_same_from_a_free_layout(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm")
    checked(name, free_export(name, tmp_path / "free", **settings), tmp_path / "mlx")


@every_case
def test_mlx_lm_computes_the_same_from_a_uniform_layout(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm")
    wide = {**settings, "intermediate_size": 80}
    checked(name, uniform_export(name, tmp_path / "uniform", **wide), tmp_path / "mlx")


def test_mlx_lm_computes_the_same_from_uneven_groups(tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm")
    source = sized_export("llama_gqa", tmp_path / "free", (4, 3, 0, 2, 1), (40, 13, 25, 0, 8))
    checked("llama_gqa", source, tmp_path / "mlx")


def test_the_folder_keeps_the_rules_of_sglang_but_one(tmp_path: Path) -> None:
    """Its nemotron_nas.py knows widths by `ffn_mult` alone; it was read, not run. It wants one number of KV heads."""
    source = sized_export("llama_gqa", tmp_path / "free", (4, 3, 0, 1), (40, 13, 300, 0), intermediate_size=320)
    assert main(["export", str(source), "--to", "mlx", "--out", str(tmp_path / "mlx")]) == 0
    check_rules(tmp_path / "mlx")
    config = config_of(tmp_path / "mlx")
    widths = [block["ffn"] for block in config["block_configs"]]
    assert [set(ffn) for ffn in widths] == [{"no_op", "replace_with_linear", "ffn_mult"}] * 4
    assert [width_by_mult(ffn["ffn_mult"], config["hidden_size"]) for ffn in widths[:3]] == [256, 256, 512]
    assert config["num_attention_heads"] * config["head_dim"] == config["hidden_size"]
    ours: Any = apt.load_model(source)
    inputs = inputs_of(ours)
    theirs = logits_of(in_llama_layers(tmp_path / "mlx"), inputs)
    assert difference(theirs, logits_of(ours, inputs), inputs["attention_mask"]) < 1e-5
    notes = json.loads((tmp_path / "mlx/apt_deploy.json").read_text())["notes"]
    assert f"{1024 - (40 + 13 + 300)} of 1024 neurons are padding: zeros" in notes


@every_case
def test_transformers_reads_the_folder_too(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """Settings under their old names beside the new ones change nothing there."""
    source = uniform_export(name, tmp_path / "uniform", **{**settings, "intermediate_size": 80})
    assert main(["export", str(source), "--to", "mlx", "--out", str(tmp_path / "mlx")]) == 0
    ours: Any = apt.load_model(source)
    inputs = inputs_of(ours)
    assert difference(logits_of(stock_model(tmp_path / "mlx"), inputs), logits_of(ours, inputs)) < 1e-6
    assert config_of(tmp_path / "mlx")["rope_theta"] == 300.0


def test_a_sliding_window_that_mlx_lm_does_not_know_is_said(tmp_path: Path) -> None:
    source = free_export("mistral", tmp_path / "free")
    assert main(["export", str(source), "--to", "mlx", "--out", str(tmp_path / "mlx")]) == 0
    notes = json.loads((tmp_path / "mlx/apt_deploy.json").read_text())["notes"]
    assert "mlx-lm's mistral has no sliding window: other answers behind 4 tokens" in notes


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("gpt2", {}, "of GPT2LMHeadModel nothing was run in mlx-lm"),
        ("t5", {}, "of T5ForConditionalGeneration nothing was run in mlx-lm"),
        ("llama_gqa", {"hidden_act": "gelu"}, "its llama has the activation silu, not gelu"),
        ("phi3_sliding", {}, "its phi3 takes the hidden size over the number of heads for the size of a head"),
        ("gemma3", {"layer_types": ["sliding_attention", "full_attention", "full_attention"]}, "in every n-th layer"),
    ],
)
def test_what_mlx_lm_cannot_say(
    name: str, settings: dict[str, Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = free_export(name, tmp_path / "free", **settings)
    assert main(["export", str(source), "--to", "mlx", "--out", str(tmp_path / "mlx")]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "mlx").exists()
