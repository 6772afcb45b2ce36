"""``apt compress``: a folder that is smaller, loads, and says what it was before and after."""

import json
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_batch, tiny_model
from tiny_run import sentences, tiny_bert, tiny_tokenizer, write_csv
from tiny_text import write_text_config

import apt
from apt.cli import main
from apt.runs.compress import RECORD

QUICK = ["calibration_batches=2", "moment_batches=9", "round_to=1", "hardware.device=cpu", "num_threads=1"]


def test_a_decoder_from_a_config_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_text_config(tmp_path)
    out = tmp_path / "small"
    command = ["compress", str(config), "--sparsity", "0.4", "--out", str(out), *QUICK]
    assert main(command) == 0
    told = capsys.readouterr().err.splitlines()[-1]
    record = json.loads((out / RECORD).read_text())
    assert f"perplexity {record['before']['perplexity']:.4g} before, {record['after']['perplexity']:.4g} after" in told
    assert record["event"]["sparsity"] >= 0.4
    notes = record["event"]["prune"]["repair"].values()
    assert all(note["after"] <= note["before"] for note in notes)
    assert any(note["after"] < note["before"] for note in notes)
    assert main(["eval", str(out), str(config)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["perplexity"] == record["after"]["perplexity"]
    assert "compress" in (out / "README.md").read_text()
    # A second one asks before it replaces; the same command gives the same model.
    first = (out / "model.safetensors").read_bytes()
    assert main(command) == 2
    assert "exists; give another folder or --overwrite" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0
    assert (out / "model.safetensors").read_bytes() == first


def test_an_encoder_with_its_head_by_model_and_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_bert().save_pretrained(tmp_path / "tiny")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    data = write_csv(tmp_path / "rows.csv", sentences(240))
    out = tmp_path / "small"
    assert main(["compress", str(tmp_path / "tiny"), str(data), "test_size=48", "--out", str(out), *QUICK]) == 0
    model = apt.load_model(out)
    record = json.loads((out / RECORD).read_text())
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in tiny_bert().parameters())
    assert set(record["before"]) == set(record["after"]) >= {"accuracy"}
    assert not list(tmp_path.glob("*.partial"))


def test_what_is_missing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compress", "some-model", "--out", str(tmp_path / "x")]) == 2
    assert "compress: give a model and its data, or a config file that names both" in capsys.readouterr().err
    with pytest.raises(ValueError, match="compress: there is no batch to calibrate on"):
        apt.compress(tiny_model("bert"), [])


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("name", ["bert", "llama_gqa"])
def test_the_function_with_labels_and_without(name: str, labelled: bool, tmp_path: Path) -> None:
    batches = [tiny_batch(name, seed=seed) for seed in range(9)]
    if not labelled:
        batches = [{key: value for key, value in batch.items() if key != "labels"} for batch in batches]
    model = tiny_model(name)
    assert apt.compress(model, batches, 0.4, rounds=2, round_to=1) is model
    assert apt.summary(model).sparsity >= 0.4
    assert not model.training
    apt.export_model(model, tmp_path / "small")
    with torch.no_grad():
        ours = model(**batches[0]).logits
        assert torch.allclose(apt.load_model(tmp_path / "small")(**batches[0]).logits, ours, atol=1e-5)


def test_what_is_compressed_can_be_trained_on(tmp_path: Path) -> None:
    model = apt.compress(tiny_model("llama_gqa"), [tiny_batch("llama_gqa", seed=seed) for seed in range(9)], round_to=1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    run = apt.Controller(model.train(), optimizer, 5)
    assert not run.awaits_calibration
    assert not run.active
    losses = []
    for _ in range(5):
        batch = tiny_batch("llama_gqa", seed=3)
        loss = run.loss(model(**batch), batch)
        loss.backward()
        run.after_backward()
        optimizer.step()
        run.after_step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
