"""Cuts of a plain model: what is dropped did nothing, layers are numbered anew, FFNs get one width."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import tiny_bert
from tiny_text import tiny_llama, write_text_config

from apt.runs.config import load_config
from apt.runs.data import TextLoader
from apt.runs.models import build_model, build_tokenizer
from bench import decoder, plain_cuts
from bench.arms import settings_of
from bench.training import block_parameters

IDS = torch.arange(5, 21).view(2, 8)


def idle(model: Any, layer: int) -> Any:
    """A Llama one of whose layers adds nothing."""
    with torch.no_grad():
        model.model.layers[layer].self_attn.o_proj.weight.zero_()
        model.model.layers[layer].mlp.down_proj.weight.zero_()
    return model


def test_the_layer_that_does_nothing_has_no_influence_and_is_no_loss() -> None:
    model = idle(tiny_llama(layers=3), 1)
    scores = plain_cuts.block_influence(model, [{"input_ids": IDS}])
    assert scores[1] == pytest.approx(0.0, abs=1e-6)
    assert min(scores[0], scores[2]) > 0.01
    whole = copy.deepcopy(model)
    plain_cuts.keep_layers(model, (0, 2))
    assert (len(model.model.layers), model.config.num_hidden_layers) == (2, 2)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, whole(IDS).logits)
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "use_cache": True}
    assert torch.equal(model.generate(IDS, **settings), whole.generate(IDS, **settings))  # the cache has its places


def test_influence_is_by_the_output_of_the_last_layer_and_without_padding() -> None:
    model = idle(tiny_llama(), 1)
    assert plain_cuts.block_influence(model, [{"input_ids": IDS}])[1] == pytest.approx(0.0, abs=1e-6)
    bert = tiny_bert()
    mask = torch.ones_like(IDS)
    mask[:, 5:] = 0
    padded = plain_cuts.block_influence(bert, [{"input_ids": IDS, "attention_mask": mask}])
    bare = plain_cuts.block_influence(bert, [{"input_ids": IDS[:, :5], "attention_mask": mask[:, :5]}])
    assert padded == pytest.approx(bare, rel=1e-5)


def test_the_first_layers_stay_as_they_are() -> None:
    model: Any = tiny_bert()
    first = model.bert.encoder.layer[0]
    total = block_parameters(model)
    assert plain_cuts.keep_layers(model, range(1)) is model
    assert list(model.bert.encoder.layer) == [first]
    assert block_parameters(model) == total // 2
    with pytest.raises(ValueError, match="3 layers cannot stay of 1; ask for 1 to 1"):
        plain_cuts.keep_layers(model, range(3))
    model.config.model_type = "gpt2"
    with pytest.raises(ValueError, match="layers are dropped from bert and llama here, not from gpt2"):
        plain_cuts.keep_layers(model, range(1))


def test_names_and_what_they_set() -> None:
    assert plain_cuts.parse("ffn-repaired-60") == ("ffn-repaired", 60)
    assert plain_cuts.parse("first-2") == ("first", 2)
    assert plain_cuts.parse("apt-60") is plain_cuts.parse("first") is None
    assert "pruning.repair=weights" in plain_cuts.overrides("ffn-repaired-60")
    assert "pruning.repair=weights" not in plain_cuts.overrides("ffn-60")
    assert settings_of("first-2") == ("first", ["pruning.target_sparsity=0", "pruning.num_events=0"])
    with pytest.raises(SystemExit, match=r"no arm is called 'second-2'; there are full, .* ffn-60, .* first-3, "):
        settings_of("second-2")


def test_ffns_get_one_width_and_a_repair_helps(tmp_path: Path) -> None:
    path = write_text_config(tmp_path, pruning={"calibration_batches": 4, "moment_batches": 16})
    logits = {}
    for arm in ("ffn-30", "ffn-repaired-30"):
        config = load_config(path, plain_cuts.overrides(arm))
        tokenizer = build_tokenizer(config)
        data = TextLoader(config.data, tokenizer, 0)
        model: Any = build_model(config, None, tokenizer).eval()
        ids = torch.tensor([block["input_ids"] for block in map(data.test.__getitem__, range(8))])
        with torch.no_grad():
            logits["dense"] = model(ids).logits
        total = block_parameters(model)
        assert plain_cuts.cut(arm, model, config, data) is model
        assert 0.3 <= 1.0 - block_parameters(model) / total < 0.4
        assert len({layer.mlp.up_proj.out_features for layer in model.model.layers}) == 1
        assert not any(hasattr(module, "unit_mask") for module in model.modules())
        assert not model.training
        with torch.no_grad():
            logits[arm] = model(ids).logits
    errors = {arm: float((logits[arm] - logits["dense"]).square().mean()) for arm in logits}
    assert 0.0 < errors["ffn-repaired-30"] < errors["ffn-30"]


def test_lora_behind_a_cut_is_measured_as_the_other_arms(tmp_path: Path) -> None:
    path = write_text_config(tmp_path, training={"max_steps": 3})
    row = decoder.run(path, "influence-1", 0, [], tmp_path / "influence")
    assert (row["steps"], row["sparsity"]) == (3, 0.5)
    assert row["perplexity"] != row["perplexity_untuned"]
    times = decoder.speed(load_config(path), {"influence-1": tmp_path / "influence"}, runs=1)
    assert {(row["what"], row["arm"]) for row in times} >= {("generation", "influence-1"), ("training", "influence-1")}
