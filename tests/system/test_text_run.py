"""A run on plain text at toy size: train, prune, export, perplexity of the export in another command, report."""

import json
import math
from pathlib import Path

import pytest
from tiny_run import efficiency_of, metrics_of
from tiny_text import WORDS, write_gguf, write_text_config

import apt.training.controller.goal
from apt.cli import main
from apt.files.whole import read_jsonl
from apt.pruning.latency_table import LatencyTable


def test_a_run_on_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_text_config(tmp_path)
    assert main(["train", str(config)]) == 0
    out, err = capsys.readouterr()
    metrics = metrics_of(tmp_path / "run")
    assert f"{metrics['train_size']:,} blocks to train on, {metrics['test_size']:,} to test on" in err
    # The text can be told apart nine times of ten; a model that has learnt nothing is no better than guessing a word.
    assert 1.0 < metrics["perplexity"] < 0.5 * len(WORDS)
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))
    assert metrics["perplexity"] == pytest.approx(metrics["perplexity_before_export"], rel=1e-5)
    assert metrics["sparsity"] >= 0.3
    times = efficiency_of(tmp_path / "run")
    assert times["generation_shape"] == [4, 8, 4]
    assert min(times["generated_per_s_dense"], times["generated_per_s_small"]) > 0.0
    assert len(read_jsonl(tmp_path / "run" / "events.jsonl")) == 2
    assert f"perplexity on {metrics['test_tokens']:,} tokens" in out
    assert "generated tokens/s small (4 x 8 + 4 tokens)" in out

    assert main(["eval", str(tmp_path / "run" / "model"), str(config)]) == 0
    scores = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert scores["perplexity"] == metrics["perplexity"]
    assert scores["test_tokens"] == metrics["test_tokens"]


def test_a_run_from_a_gguf_file(tmp_path: Path) -> None:
    config = write_text_config(tmp_path, training={"max_steps": 20}, evaluation={"event_timing_steps": 0})
    path = write_gguf(tmp_path / "tiny.gguf")
    assert main(["train", str(config), f"output_dir={tmp_path / 'plain'}"]) == 0
    assert main(["train", str(config), f"model={path}"]) == 0
    plain, found = metrics_of(tmp_path / "plain"), metrics_of(tmp_path / "run")
    assert found["model"] == str(path)
    assert found["perplexity"] == pytest.approx(plain["perplexity"], rel=1e-4)
    assert {"model.safetensors", "tokenizer.json"} <= {file.name for file in (tmp_path / "run" / "model").iterdir()}


def test_a_run_that_prunes_before_it_tunes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_text_config(tmp_path, pruning={"prune_before_tuning": True, "calibration_batches": 4})
    assert main(["train", str(config), "num_tuning_events=2", "tune_end=20"]) == 0
    events = read_jsonl(tmp_path / "run" / "events.jsonl")
    assert [(event["prune"] is None, event["rank"] is None) for event in events] == [
        (False, True),
        (True, False),
        (True, False),
    ]
    assert (events[0]["step"], events[-1]["step"]) == (0, 20)
    metrics = metrics_of(tmp_path / "run")
    assert events[0]["sparsity"] == metrics["sparsity"] >= 0.3
    assert 1.0 < metrics["perplexity"] < 0.5 * len(WORDS)
    assert efficiency_of(tmp_path / "run")["tokens_per_s_before"] is None
    out = capsys.readouterr().out
    assert "tokens/s before the first event" in out
    timings = json.loads((tmp_path / "run" / "event_timing.json").read_text(encoding="utf-8"))
    assert [row["step"] for row in timings["events"]] == [0]


def test_a_run_that_is_pruned_before_it_is_tuned(tmp_path: Path) -> None:
    pruning = {"prune_before_tuning": True, "calibration_batches": 3, "salience": "sum_of_products"}
    assert main(["train", str(write_text_config(tmp_path, pruning=pruning))]) == 0
    metrics, events = metrics_of(tmp_path / "run"), read_jsonl(tmp_path / "run" / "events.jsonl")
    assert events[0]["step"] == 0
    assert events[0]["sparsity"] == metrics["sparsity"] >= 0.3
    assert len(events) > 1  # ranks grow later
    assert all(event["removed"] == 0.0 for event in events[1:])
    assert metrics["perplexity"] < 0.5 * len(WORDS)
    assert metrics["perplexity"] == pytest.approx(metrics["perplexity_before_export"], rel=1e-5)


def test_a_run_whose_goal_is_speed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = {"layers.heads": [[0, 0.0], [4, 2.0]], "layers.neurons": [[0, 0.0], [48, 3.0]]}
    table = LatencyTable(device="paper", batch_size=4, length=8, dense_ms=11.0, rest_ms=1.0, parts=parts)
    monkeypatch.setattr(apt.training.controller.goal, "measure_latency", lambda *_: table)
    config = write_text_config(tmp_path, training={"max_steps": 20}, evaluation={"event_timing_steps": 0})
    assert main(["train", str(config), "target_speedup=1.5"]) == 0
    metrics, events = metrics_of(tmp_path / "run"), read_jsonl(tmp_path / "run" / "events.jsonl")
    assert (metrics["target_sparsity"], metrics["target_speedup"]) == (None, 1.5)
    assert metrics["predicted_speedup"] == events[-1]["predicted_speedup"] >= 1.5
    assert efficiency_of(tmp_path / "run")["speedup"] > 0.0
    out = capsys.readouterr().out
    assert "speed-up predicted by the latency table" in out
    assert "inference dense over small" in out
    assert main(["train", str(config), "target_speedup=12", f"output_dir={tmp_path / 'other'}"]) == 2
    assert "at most 7.333 times as fast on paper" in capsys.readouterr().err
