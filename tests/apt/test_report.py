"""The report is a function of the files of a run."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from run_records import METRICS, run_folder, write_metrics

from apt.runs.report import print_report


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


def test_times_in_a_file_of_their_own_or_with_the_scores(tmp_path: Path) -> None:
    older = printed(run_folder(tmp_path / "run", METRICS))
    write_metrics(tmp_path / "run", METRICS)
    assert "train_seconds" not in (tmp_path / "run" / "metrics.json").read_text(encoding="utf-8")
    assert printed(tmp_path / "run") == older


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


PRUNED: dict[str, Any] = {"step": 3, "target_sparsity": 0.5, "kept": {"a": [0]}, "round_to": 1}
NOTE: dict[str, Any] = {"ridge": None, "before": 0.2, "after": 0.1}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"prune": {"step": 3, "target_sparsity": 0.5, "kept": {"layers.0.heads": None}, "round_to": 1}},
            "what stays of",
        ),
        ({"prune": {"step": 3, "target_sparsity": 0.5, "kept": [[]], "round_to": 1}}, r"events\.jsonl: "),
        ({"rank": {"step": 3, "budget": 9, "ranks": {"a": "2"}}}, "the rank of 'a' is no whole number"),
        ({"sparsity": "much"}, "sparsity is no number"),
        ({"prune": [1]}, r"events\.jsonl: "),
        ({"prune": PRUNED | {"repair": [1]}}, r"events\.jsonl: "),
        ({"prune": PRUNED | {"repair": {"a": None}}}, r"events\.jsonl: "),
        ({"prune": PRUNED | {"repair": {"a": NOTE | {"ridge": "x"}}}}, "ridge of a repair is no number"),
        ({"prune": PRUNED | {"repair": {"a": NOTE | {"after": None}}}}, "after of a repair is no number"),
    ],
)
def test_an_event_that_is_none_is_told(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    event: dict[str, Any] = {
        "step": 3,
        "prune": None,
        "rank": None,
        "target_sparsity": 0.5,
        "sparsity": 0.5,
        "removed": 0.1,
    }
    event |= {"block_params": 9, "trainable_params": 9, "seconds": 0.1}
    folder = run_folder(tmp_path / "run", METRICS)
    (folder / "events.jsonl").write_text(json.dumps(event) + "\n", encoding="utf-8")
    print_report(folder)
    (folder / "events.jsonl").write_text(json.dumps(event | change) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=rf"a record in .* is corrupt .*{words}"):
        print_report(folder)
