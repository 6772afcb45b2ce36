"""Runs on sentences whose answer is a number, and on GLUE's tasks by name; sentences that are too long."""

import json
from pathlib import Path

import pytest
from tiny_run import metrics_of, sentences, write_config, write_csv

from apt.cli import main
from apt.runs.config import DataConfig, EvaluationConfig, ModelConfig, RunConfig
from apt.runs.measure import metric_names


def similarities(count: int) -> list[tuple[str, ...]]:
    """Pairs as STS-B has them: a score of 0 to 5, here higher by 3 where the first sentence is a good one."""
    rows = sentences(count)
    seconds = [text.partition(" ")[2] for text, _ in reversed(rows)]
    return [
        (text, other, str(1.0 + 2.0 * int(good) + 0.25 * (len(text) % 3)))
        for (text, good), other in zip(rows, seconds, strict=True)
    ]


def test_a_run_on_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path, model={"task": "regression"})
    write_csv(tmp_path / "rows.csv", similarities(240), ("sentence1", "sentence2", "score"))
    assert main(["train", str(config), "label_column=score", "max_length=32", "learning_rate=1e-2"]) == 0
    metrics = metrics_of(tmp_path / "run")
    assert metrics["metric"] == "pearson"
    assert metrics["pearson"] == pytest.approx(metrics["pearson_before_export"], abs=1e-5)
    assert metrics["pearson"] > 0.8
    assert metrics["spearman"] > 0.5
    assert 0.0 < metrics["mse"] < 1.5
    assert metrics["sparsity"] >= 0.5
    assert "pearson on 48 sentences" in capsys.readouterr().out
    saved = json.loads((tmp_path / "run/model/config.json").read_text(encoding="utf-8"))
    assert saved["problem_type"] == "regression"
    assert main(["eval", str(tmp_path / "run/model"), str(config), "label_column=score", "max_length=32"]) == 0
    scores = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert scores["mse"] == metrics["mse"]


def test_the_metrics_asked_for(tmp_path: Path) -> None:
    config = write_config(tmp_path, training={"max_steps": 20}, evaluation={"event_timing_steps": 0})
    assert main(["train", str(config), "metrics=[matthews, f1]"]) == 0
    metrics = metrics_of(tmp_path / "run")
    assert metrics["metric"] == "matthews"
    assert metrics["matthews"] == metrics["matthews_before_export"]
    assert "f1" in metrics
    assert "accuracy" not in metrics


def test_gates_in_use_are_told_layer_by_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path, model={"method": "gsa"}, training={"max_steps": 5, "initial_rank": 2})
    assert main(["train", str(config), "learning_rate=0.1"]) == 0
    gates = metrics_of(tmp_path / "run")["active_gates"]
    assert len(gates) == 8  # q, v, up and down of two layers
    assert all(count <= 4 for count in gates.values())  # of 2 r, each 0 at the start
    assert sum(gates.values()) > 8
    assert "ranks or gates in use, of 8 layers" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("data", "task", "asked", "first"),
    [
        ("glue/cola", "classification", None, "matthews"),
        ("glue/mrpc", "classification", None, "f1"),
        ("glue/sst2", "classification", None, "accuracy"),
        ("glue/cola", "classification", ["accuracy"], "accuracy"),
        ("glue/stsb", "regression", None, "pearson"),
        ("wikitext/cola", "language_modeling", None, "perplexity"),
    ],
)
def test_the_metric_of_a_glue_task(data: str, task: str, asked: list[str] | None, first: str) -> None:
    config = RunConfig(
        output_dir="x",
        model=ModelConfig(name="x", task=task),
        data=DataConfig(datasets=data),
        evaluation=EvaluationConfig(metrics=asked),
    )
    assert metric_names(config)[0] == first


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path)
    for overrides, words in (
        (["metrics=[pearson]"], "must be one of ['accuracy', 'f1', 'matthews'], got 'pearson'"),
        (["metrics=[]"], "evaluation.metrics must name a metric"),
        (["task=regression", "num_labels=2"], "model.num_labels counts classes"),
    ):
        assert words in refused(capsys, "train", config, *overrides)
    rows = [(" ".join(["word1"] * 70), "0"), *sentences(60)]
    write_csv(tmp_path / "rows.csv", rows)
    error = refused(capsys, "train", config, "max_length=70")
    assert error.endswith(
        "a sequence of 70 tokens is longer than the 64 positions of the model; set data.max_length to at most 64"
    )
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "rows.csv", "tiny"}  # nothing half-written
