"""What a run records for its report: each step once, also where it is resumed, and nothing is disturbed by it."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_run import write_config
from transformers import TrainerCallback

from apt.cli import main
from apt.files.whole import read_jsonl
from apt.runs.report import report
from apt.training.controller import Controller
from apt.training.recorder import Recorder

SIZES: dict[str, dict[str, Any]] = {
    "training": {"max_steps": 40, "logging_steps": 4, "save_steps": 8},
    "evaluation": {"event_timing_steps": 0, "inference_repeats": 1, "score_steps": 10},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("whole")
    assert main(["train", str(write_config(folder, **SIZES))]) == 0
    return folder / "run"


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without what a clock or the machine's memory says."""
    measured = ("seconds", "tokens_per_s", "memory_mb", "peak_mb")
    return [{name: value for name, value in row.items() if name not in measured} for row in rows]


def test_each_logging_step_has_a_row(whole: Path) -> None:
    rows = [row for row in read_jsonl(whole / "steps.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == list(range(4, 41, 4))
    for row in rows:
        assert row["steps"] == 4
        assert 4 * 8 * 6 <= row["tokens"] <= 4 * 8 * 16  # sentences of 6 to 14 tokens with their marks, batches of 8
        assert row["tokens_per_s"] == pytest.approx(row["tokens"] / row["seconds"])
        assert 0.0 < row["memory_mb"] <= row["peak_mb"]
        assert row["learning_rate"] >= 0.0
    events = read_jsonl(whole / "events.jsonl")
    assert rows[-1]["sparsity"] == events[-1]["sparsity"]
    assert rows[-1]["planned_sparsity"] == 0.5
    planned = [row["planned_sparsity"] for row in rows]
    assert planned == sorted(planned)


def test_scores_are_taken_on_the_way(whole: Path) -> None:
    rows = [row for row in read_jsonl(whole / "steps.jsonl") if "eval_accuracy" in row]
    assert [row["step"] for row in rows] == [10, 20, 30, 40]
    metrics = json.loads((whole / "metrics.json").read_text(encoding="utf-8"))
    assert rows[-1]["eval_accuracy"] == metrics["accuracy_before_export"]


def test_shapes_are_those_of_the_events(whole: Path) -> None:
    events = read_jsonl(whole / "events.jsonl")
    start, *rows = read_jsonl(whole / "shapes.jsonl")
    assert (start["step"], start["event"]) == (0, False)
    assert start["units"] == {f"layers.{i}.{kind}": n for i in range(2) for kind, n in (("heads", 4), ("neurons", 64))}
    assert set(start["ranks"].values()) == {8}
    assert [row["step"] for row in rows] == [event["step"] for event in events]
    places = start["places"]
    assert places["bert.encoder.layer.1.attention.self.query"] == ["layers", 1, "q"]
    assert places["bert.encoder.layer.0.output.dense"] == ["layers", 0, "down"]
    for row, event in zip(rows, events, strict=True):
        kept = {name: len(positions) for name, positions in event["prune"]["kept"].items()}
        assert {name: row["units"].get(name, 0) for name in kept} == kept
        assert row["ranks"].items() >= {name: rank for name, rank in event["rank"]["ranks"].items() if rank}.items()
        assert row["adapter_params"] <= event["rank"]["budget"]
        assert set(row["salience"]) == {"heads", "neurons"}
        quantiles = [values for sides in row["salience"].values() for values in sides.values() if values]
        assert all(values == sorted(values) and len(values) == 7 for values in quantiles)
    first = rows[0]["salience"]["neurons"]
    assert first["removed"][3] < first["kept"][3]  # the median of what went lies below that of what stayed


def test_scoring_and_recording_disturb_nothing(whole: Path, tmp_path: Path) -> None:
    sizes = {**SIZES, "evaluation": SIZES["evaluation"] | {"score_steps": 0}}
    assert main(["train", str(write_config(tmp_path, **sizes))]) == 0
    assert (tmp_path / "run/model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()
    assert not [row for row in read_jsonl(tmp_path / "run/steps.jsonl") if "loss" not in row]


def test_a_resumed_run_doubles_no_row(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped at step 23, halfway through a line; it goes on from the checkpoint of step 16."""
    config, after_step = write_config(tmp_path, **SIZES), Controller.after_step

    def stop(controller: Controller) -> None:
        if controller.step == 22:
            raise KeyboardInterrupt
        after_step(controller)

    monkeypatch.setattr(Controller, "after_step", stop)
    assert main(["train", str(config)]) == 130
    monkeypatch.undo()
    with (tmp_path / "run.partial/steps.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 24, "lo')
    assert main(["train", str(config), "--resume"]) == 0
    ours, theirs = (read_jsonl(run / "steps.jsonl") for run in (tmp_path / "run", whole))
    assert timeless(ours) == timeless(theirs)
    assert read_jsonl(tmp_path / "run/shapes.jsonl") == read_jsonl(whole / "shapes.jsonl")
    page = report(tmp_path / "run").read_text(encoding="utf-8")
    assert "training, s (from step 16 on)" in page


@pytest.mark.parametrize("end", ["{}", "[1]", '{"step": "24"}', '{"step": 24, "lo', "NaN"])
def test_a_row_that_is_none_stops_no_run_that_is_resumed(end: str, tmp_path: Path) -> None:
    """As a kill, or an editor, left the file of a run that is resumed."""
    for name in ("steps.jsonl", "shapes.jsonl"):
        (tmp_path / name).write_text('{"step": 10}\n' + end, encoding="utf-8")
    Recorder(tmp_path).begin(SimpleNamespace(step=16, events=[None]))  # type: ignore[arg-type]
    assert read_jsonl(tmp_path / "steps.jsonl") == read_jsonl(tmp_path / "shapes.jsonl") == [{"step": 10}]


def test_events_are_logged_as_the_trainer_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever `report_to` names is a callback of the Trainer: it is told of every event, and of the losses as ever."""
    seen: list[dict[str, Any]] = []

    class Listener(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            seen.append({"at": state.global_step, **logs})

    from apt.runs import run

    class Trainer(run.APTrainer):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs, callbacks=[Listener()])

    monkeypatch.setattr(run, "APTrainer", Trainer)
    # An event falls on a logging step: neither is lost.
    schedule = {"num_events": 2, "prune_start": 0, "prune_end": 16}
    assert main(["train", str(write_config(tmp_path, **SIZES, pruning=schedule))]) == 0
    events = read_jsonl(tmp_path / "run/events.jsonl")
    told = [row for row in seen if "event_sparsity" in row]
    assert [(row["at"], row["event_step"]) for row in told] == [(8, 8), (16, 16)]
    assert [row["event_sparsity"] for row in told] == [event["sparsity"] for event in events]
    assert told[-1]["event_heads"] == sum(len(k) for n, k in events[-1]["prune"]["kept"].items() if n.endswith("heads"))
    losses = [row for row in seen if "loss" in row]
    assert [row["at"] for row in losses] == list(range(4, 41, 4))
    assert all(isinstance(value, int | float) for row in told for value in row.values())
    assert losses[-1]["tokens_per_s"] > 0.0


def test_reporters_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path, **SIZES)
    assert main(["config", str(config), "training.report_to=[comet]"]) == 2
    assert "training.report_to" in capsys.readouterr().err
