"""A run of each task on its tiny sample: train, prune, export, score the export in another command, report."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_run import efficiency_of, metrics_of
from tiny_tasks import DATA, tiny_decoder, tiny_encoder_decoder, tiny_reader, word_tokenizer, write_task_config

from apt.cli import main


def run(folder: Path, config: Path, capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], str]:
    """Train, and score the export in another command, which must say the same; returns the metrics and the report."""
    assert main(["train", str(config)]) == 0
    report = capsys.readouterr().out
    metrics = metrics_of(folder / "run")
    assert metrics["sparsity"] >= 0.3
    name = metrics["metric"]
    assert metrics[name] == pytest.approx(metrics[f"{name}_before_export"], rel=1e-5)
    assert main(["eval", str(folder / "run/model"), str(config)]) == 0
    scores = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert scores[name] == metrics[name]
    return metrics, report


def test_instruction_following(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sections: dict[str, dict[str, Any]] = {
        "model": {"task": "instruction_following"},
        "data": {"datasets": str(DATA / "instructions.jsonl"), "test_size": 4},
    }
    config = write_task_config(tmp_path, tiny_decoder(), word_tokenizer(chat=True), **sections)
    metrics, report = run(tmp_path, config, capsys)
    assert 1.0 < metrics["perplexity"] < len(word_tokenizer())
    assert f"perplexity on {metrics['test_tokens']:,} tokens" in report
    assert efficiency_of(tmp_path / "run")["generated_per_s_small"] > 0.0


def test_summarization(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sections: dict[str, dict[str, Any]] = {
        "model": {"task": "summarization"},
        "data": {"datasets": str(DATA / "summaries.jsonl"), "test_size": 4, "max_target_length": 24},
        "evaluation": {"num_beams": 2},
        "training": {"max_steps": 80, "learning_rate": "1e-2"},
    }
    config = write_task_config(tmp_path, tiny_encoder_decoder(), word_tokenizer(), **sections)
    metrics, report = run(tmp_path, config, capsys)
    assert metrics["metric"] == "rouge1"
    assert 0.0 < metrics["rouge1"] <= 1.0
    assert 0.0 <= metrics["rouge2"] <= metrics["rouge1"]
    assert f"rougeL on {metrics['test_size']} texts" in report


def test_question_answering(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sections: dict[str, dict[str, Any]] = {
        "model": {"task": "question_answering"},
        "data": {"datasets": str(DATA / "questions.jsonl"), "test_size": 4, "max_length": 24},
    }
    config = write_task_config(tmp_path, tiny_reader(), word_tokenizer(), **sections)
    metrics, report = run(tmp_path, config, capsys)
    assert metrics["metric"] == "f1"
    assert 0.0 <= metrics["exact_match"] <= metrics["f1"] <= 1.0
    assert (metrics["test_questions"], metrics["test_size"]) == (4, metrics["test_size"])
    assert metrics["test_size"] > 4  # windows
    assert "no_answer_threshold" in metrics
    assert "f1 on 4 questions" in report
