"""``apt compress``: a folder that is smaller, loads, and says what it was before and after."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_batch, tiny_model
from tiny_run import sentences, tiny_bert, tiny_tokenizer, write_config, write_csv, write_model
from tiny_text import write_text_config

import apt
import apt.runs.compress
from apt.cli import main
from apt.pruning.latency_table import LatencyTable
from apt.runs.compress import RECORD, compress_config

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


def test_an_encoder_by_sentences_without_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A text file: units are chosen by the entropy of the answers, which are compared with those before."""
    tiny_bert().save_pretrained(tmp_path / "tiny")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    (tmp_path / "rows.txt").write_text("\n\n".join(text for text, _ in sentences(240)), encoding="utf-8")
    out = tmp_path / "small"
    command = ["compress", str(tmp_path / "tiny"), str(tmp_path / "rows.txt"), "test_size=48", "--out", str(out)]
    assert main([*command, *QUICK]) == 0
    record = json.loads((out / RECORD).read_text())
    assert record["before"] == {"agreement": 1.0}
    assert 0.5 < record["after"]["agreement"] <= 1.0
    told = capsys.readouterr().err
    assert "no column 'label': the model is compared with what it was before" in told
    assert "agreement 1 before" in told
    assert main([*command, "--overwrite", "label_column=stars", *QUICK]) == 0


def test_what_is_missing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compress", "some-model", "--out", str(tmp_path / "x")]) == 2
    assert "compress: give a model and its data, or a config file that names both" in capsys.readouterr().err
    with torch.inference_mode(), pytest.raises(ValueError, match=r"outside of torch\.inference_mode"):
        apt.compress(tiny_model("bert"), [tiny_batch("bert")])
    (tmp_path / "file").touch()
    config = write_text_config(tmp_path)
    assert main(["compress", str(config), "--out", str(tmp_path / "file" / "x")]) == 2
    assert "is no folder; give another --out" in capsys.readouterr().err
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


def unlabelled(name: str, count: int = 9) -> list[dict[str, torch.Tensor]]:
    found = [tiny_batch(name, seed=seed) for seed in range(count)]
    return [{key: value for key, value in batch.items() if key != "labels"} for batch in found]


def none_labelled(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**batch, "labels": torch.full_like(batch["labels"], -100)}


WRONG: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "nothing to go": ("bert", unlabelled("bert"), {"target_sparsity": 0.0}, "compress: nothing is asked to go"),
    "too much": ("bert", unlabelled("bert"), {"target_sparsity": 0.99}, "pruner: target_sparsity 0.99 is not reach"),
    "training": ("bert", unlabelled("bert"), {"use_self_distillation": True}, "compress: nothing is trained here"),
    "no such moment": ("bert", unlabelled("bert"), {"prune_before_tuning": False}, "compress: nothing is trained here"),
    "ranks that grow": ("bert", unlabelled("bert"), {"method": "apt"}, "compress: ranks of method 'apt' grow in a run"),
    "tuples": ("bert", [tuple(unlabelled("bert")[0].values())], {}, "compress: batches are mappings .* got a tuple"),
    "one batch": ("bert", unlabelled("bert")[0], {}, "compress: batches are mappings .* got a str"),
    "one number": (
        lambda: tiny_model("bert", num_labels=1),
        unlabelled("bert"),
        {},
        "this model predicts no classes or tokens",
    ),
    "no head": (lambda: tiny_model("bert").bert, unlabelled("bert"), {}, "this model predicts no classes or tokens"),
    "a decoder": ("t5", unlabelled("t5"), {}, "calibration: a decoder behind an encoder needs text to predict"),
    "no label": ("bert", [none_labelled(tiny_batch("bert"))], {}, "calibration: the loss depends on no unit"),
    "no unit": (
        "bert",
        unlabelled("bert"),
        {"compute_loss": lambda model, batch: model(**batch).logits.sum() * 0.0},
        "calibration: the loss depends on no unit",
    ),
}


@pytest.mark.parametrize("case", list(WRONG))
def test_what_fails_says_why_and_leaves_the_model_as_it_was_given(case: str) -> None:
    name, batches, settings, told = WRONG[case]
    model = tiny_model(name) if isinstance(name, str) else name()
    model.get_input_embeddings().requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    asked = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises((ValueError, FloatingPointError), match=told):
        apt.compress(model, batches, round_to=1, **settings)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert asked == [parameter.requires_grad for parameter in model.parameters()]
    assert not model.training


def test_what_is_compressed_to_a_speed_asks_for_no_further_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {"layers.heads": [[0, 0.0], [4, 3.0]], "layers.neurons": [[0, 0.0], [40, 2.0]]}
    table = LatencyTable(device="paper", batch_size=2, length=5, dense_ms=16.0, rest_ms=1.0, parts=parts)
    monkeypatch.setattr(apt.training.controller.goal, "measure_latency", lambda *_: table)
    model = apt.compress(tiny_model("bert"), unlabelled("bert"), round_to=1, target_speedup=2.0)
    assert apt.summary(model).sparsity > 0.3
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    assert not apt.Controller(model, optimizer, 50).active
    asked = apt.APTConfig().with_overrides(target_speedup=1.2)
    model = apt.compress(tiny_model("bert"), unlabelled("bert"), 0.5, config=asked, round_to=1, kurtosis="off")
    assert apt.summary(model).sparsity >= 0.5


def test_no_batch_is_drawn_that_is_not_used() -> None:
    drawn = iter(unlabelled("bert", 9))
    apt.compress(tiny_model("bert"), drawn, round_to=1, calibration_batches=2, moment_batches=4)
    assert len(list(drawn)) == 5


def test_a_run_of_a_file_that_asks_for_speed_is_compressed_to_the_sparsity(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path, pruning={"target_speedup": 1.5, "num_events": 3})
    config = compress_config(str(path), None, tmp_path / "out", 0.4, [])
    assert (config.pruning.target_speedup, config.pruning.target_sparsity) == (None, 0.4)
    told = {"0": "compress: nothing is asked to go", "1.5": "must be in [0, 1)", "nan": "must be a number"}
    for wrong, words in told.items():
        assert main(["compress", str(path), "--sparsity", wrong, "--out", str(tmp_path / "x")]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_the_card_says_that_nothing_was_trained(tmp_path: Path) -> None:
    """Of the command and of the function; once it is trained on it says so."""
    tiny_bert().save_pretrained(tmp_path / "tiny")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    data = write_csv(tmp_path / "rows.csv", sentences(240))
    out = tmp_path / "small"
    assert main(["compress", str(tmp_path / "tiny"), str(data), "test_size=48", "--out", str(out), *QUICK]) == 0
    model = apt.compress(tiny_model("bert"), unlabelled("bert"), round_to=1)
    apt.export_model(model, tmp_path / "function")
    for folder in (out, tmp_path / "function"):
        card = (folder / "README.md").read_text()
        assert "without training" in card
        assert "fine-tuned" not in card
        assert "now merged" not in card
        assert "| projections repaired for what they lost |" in card
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            parameter.data.normal_()
    apt.export_model(model, tmp_path / "trained")
    assert "fine-tuned from" in (tmp_path / "trained/README.md").read_text()


def test_what_would_be_compressed_or_written_for_nothing_is_refused_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head drawn at random, an export that has sizes of its own, a folder that is somebody's."""
    tiny_bert().save_pretrained(tmp_path / "tiny")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    small = apt.compress(tiny_bert(), [{"input_ids": torch.arange(5, 14)[None]}], 0.3, round_to=1)
    apt.export_model(small, tmp_path / "export")
    tiny_tokenizer().save_pretrained(tmp_path / "export")
    headless = write_model(tmp_path / "headless")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    data = write_csv(tmp_path / "rows.csv", sentences(240))
    monkeypatch.setattr(apt.runs.compress, "compress", lambda *_, **__: pytest.fail("compressed"))
    for model, out, words in (
        (headless, "x", "which would be drawn at random, and nothing trains it; give a model that was tuned"),
        (
            tmp_path / "export",
            "x",
            "is an export of apt-lm with sizes of its own; give the model that it was made",
        ),
        (tmp_path / "tiny", "mine", "holds no apt_export.json; it stays as it is, give another folder"),
    ):
        command = ["compress", str(model), str(data), "test_size=48", "--out", str(tmp_path / out), "--overwrite"]
        assert main([*command, *QUICK]) == 2
        assert words in capsys.readouterr().err
    assert (tmp_path / "mine/notes.txt").read_text() == "mine"


def test_without_repair_no_error_of_projections_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["compress", str(write_text_config(tmp_path)), "--out", str(tmp_path / "small"), *QUICK]
    assert main([*command, "repair=off", "rounds=1"]) == 0
    assert "projections" not in capsys.readouterr().err.splitlines()[-1]


def test_a_batch_without_a_label_among_others_says_nothing() -> None:
    """As in a run with accumulation: instructions that were cut off before their answers."""
    batches = [tiny_batch("llama_gqa", seed=seed) for seed in range(3)]
    settings = {"round_to": 1, "rounds": 1, "repair": "off", "layout": "uniform"}
    ours = apt.compress(tiny_model("llama_gqa"), [*batches, none_labelled(batches[0])], **settings)
    theirs = apt.compress(tiny_model("llama_gqa"), batches, **settings)
    assert apt.summary(ours).units == apt.summary(theirs).units
    with torch.no_grad():
        assert torch.equal(ours(**batches[0]).logits, theirs(**batches[0]).logits)


def test_units_that_no_repair_is_for_are_chosen_without_it() -> None:
    """The choice that knows the repair is for heads and neurons that are repaired."""
    model = apt.compress(tiny_model("bert"), [tiny_batch("bert")] * 3, unit_types=["head", "hidden"], round_to=1)
    assert apt.surgery.patch_state(model).config.pruning.salience == "fisher"
    model = apt.compress(tiny_model("bert"), [tiny_batch("bert")] * 3, repair="off", round_to=1)
    assert apt.surgery.patch_state(model).config.pruning.salience == "fisher"
    model = apt.compress(tiny_model("bert"), [tiny_batch("bert")] * 3, round_to=1)
    assert apt.surgery.patch_state(model).config.pruning.salience == "obs"
