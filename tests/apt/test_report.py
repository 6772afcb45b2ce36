"""The report is a function of the files of a run."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from apt.records import Event, PrunePlan, append_jsonl, write_json
from apt.report import print_report

METRICS: dict[str, Any] = {
    "method": "apt",
    "accuracy": 0.8265,
    "f1": 0.81,
    "test_size": 2000,
    "target_sparsity": 0.6,
    "sparsity": 0.6042,
    "params_before": 22713986,
    "params_after": 16200000,
    "train_seconds": 251.34,
    "tokens_per_s_before": 3456.7,
    "tokens_per_s_after": 8910.2,
    "latency_ms_dense": 301.26,
    "latency_ms_small": 125.5,
    "latency_shape": [32, 64],
}


def run_folder(folder: Path, metrics: dict[str, Any], events: int = 2, timings: bool = True) -> Path:
    write_json(folder / "metrics.json", metrics)
    for i in range(events):
        kept = {"layers.0.heads": [0, 1], "layers.0.cross_heads": [3], "layers.0.neurons": list(range(1200 - 8 * i))}
        plan = PrunePlan(step=i, target_sparsity=0.3, kept=kept, round_to=8)
        counts = {"block_params": 10, "trainable_params": 345678, "seconds": 0.25}
        row = Event(step=40 + i, prune=plan, rank=None, target_sparsity=0.3, sparsity=0.31, removed=0.31, **counts)
        append_jsonl(folder / "events.jsonl", row.to_json())
    if timings:
        row = {"step": 40, "removed": 0.31, "ms_before": 200.0, "ms_after": 125.0, "ratio": 1.6}
        row |= {"ms_pruned": 100.0, "ratio_pruned": 2.0, "saved_mb_before": 91.5, "saved_mb_pruned": 63.2}
        write_json(folder / "event_timing.json", {"sentences": 32, "tokens": 29, "steps": 10, "events": [row]})
    return folder


def printed(folder: Path) -> str:
    out = io.StringIO()
    print_report(folder, out)
    return out.getvalue()


def test_everything_is_there_and_fits(tmp_path: Path) -> None:
    text = printed(run_folder(tmp_path / "run", METRICS))
    for words in (
        "accuracy on 2,000 sentences │ 0.8265",
        "60.0%",
        "60.4%",
        "91.5 > 63.2",
        "22,713,986",
        "16,200,000",
        "251.3",
        "3,457",
        "8,910",
        "301.3",
        "125.5",
        "2.40",
        "1,200",
        "1,192",
        "345,678",
        "32 x 29 tokens, median of 10",
        "1.60",
    ):
        assert words in " ".join(text.split()), words
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text


def test_a_run_without_events_has_one_table(tmp_path: Path) -> None:
    text = printed(run_folder(tmp_path / "run", METRICS | {"method": "lora"}, events=0, timings=False))
    assert "Events" not in text
    assert "Forward and backward" not in text


def test_a_resumed_run_says_so(tmp_path: Path) -> None:
    unknown = {"tokens_per_s_before": None, "tokens_per_s_after": None, "resumed_from_step": 30}
    text = printed(run_folder(tmp_path / "run", METRICS | unknown))
    assert "training, s (from step 30 on)" in text
    assert "│ - │" in " ".join(text.split())


def test_no_run_and_a_broken_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no finished run; it has no metrics.json"):
        print_report(tmp_path)
    folder = run_folder(tmp_path / "run", METRICS)
    with (folder / "events.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": 3})[:-1])
    with pytest.raises(ValueError, match=r"a record in .* is corrupt"):
        print_report(folder)
