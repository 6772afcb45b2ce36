"""The command line at toy size: a whole run, what it leaves, and that no mistake costs a finished run."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import efficiency_of, metrics_of, tiny_tokenizer, write_config, write_csv

from apt.cli import main
from apt.files.whole import read_jsonl
from apt.training.controller import Controller

ROOT = Path(__file__).parents[2]
METRICS = {
    "accuracy",
    "accuracy_before_export",
    "target_sparsity",
    "sparsity",
    "params_before",
    "params_after",
    "num_events",
    "test_size",
    "seed",
    "versions",
}
EFFICIENCY = {
    *("train_seconds", "tokens_per_s_before", "tokens_per_s_after"),
    *("latency_ms_dense", "latency_ms_small", "latency_shape", "speedup"),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a config whose run is done; tests only read it."""
    folder = tmp_path_factory.mktemp("finished")
    assert main(["train", str(write_config(folder))]) == 0
    return folder


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that must fail as an error of the user does: one line, exit code 2."""
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    error = capsys.readouterr().err
    last = error.splitlines()[-1]
    assert code == 2, error
    assert last.startswith("apt: error: ")
    assert "Traceback" not in error
    return last


def shell(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "apt", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_a_run_leaves_model_metrics_and_events(finished: Path) -> None:
    run = finished / "run"
    metrics = metrics_of(run)
    assert set(metrics) >= METRICS
    assert metrics["accuracy"] == metrics["accuracy_before_export"] >= 0.9
    assert metrics["sparsity"] >= metrics["target_sparsity"] == 0.5
    assert metrics["params_after"] < metrics["params_before"]
    assert set(efficiency_of(run)) == EFFICIENCY
    assert not EFFICIENCY & set(metrics)
    assert efficiency_of(run)["latency_ms_small"] > 0.0
    events = read_jsonl(run / "events.jsonl")
    assert [event["step"] for event in events] == sorted(event["step"] for event in events)
    assert (len(events), events[-1]["sparsity"]) == (3, metrics["sparsity"])
    assert {row["step"] for row in json.loads((run / "event_timing.json").read_text(encoding="utf-8"))["events"]}
    assert {"model", "metrics.json", "events.jsonl", "config.yaml"} <= {path.name for path in run.iterdir()}
    assert not run.with_name("run.partial").exists()


def test_another_process_loads_and_scores_the_export(finished: Path) -> None:
    done = shell("eval", finished / "run" / "model", finished / "config.yaml")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["accuracy"] == metrics_of(finished / "run")["accuracy"]
    assert len(done.stdout.splitlines()) == 1


def test_the_same_config_in_another_process_the_same_metrics(finished: Path, tmp_path: Path) -> None:
    done = shell("train", finished / "config.yaml", f"output_dir={tmp_path / 'again'}")
    assert done.returncode == 0, done.stderr
    names = ("metrics.json", "model/model.safetensors")
    ours, theirs = ([(run / name).read_bytes() for name in names] for run in (finished / "run", tmp_path / "again"))
    assert ours == theirs


def test_report_and_config_print(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(finished / "run")]) == 0
    assert "sparsity reached" in capsys.readouterr().out
    assert main(["config", str(finished / "config.yaml"), "seed=7"]) == 0
    first = capsys.readouterr().out
    assert "seed: 7" in first
    # What a run saves beside its metrics is what it was started with.
    assert main(["config", str(finished / "run" / "config.yaml"), "seed=7"]) == 0
    assert capsys.readouterr().out == first


def test_a_finished_run_stays_until_a_new_one_has_succeeded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path, training={"max_steps": 20}, evaluation={"event_timing_steps": 0})
    assert main(["train", str(config)]) == 0
    before = metrics_of(tmp_path / "run")
    assert "holds a finished run; give --overwrite" in refused(capsys, "train", config)
    # An error of a later run, even with --overwrite, leaves the finished one.
    assert "min_heads" in refused(capsys, "train", config, "--overwrite", "min_heads=4", "min_neurons=64")
    assert metrics_of(tmp_path / "run") == before
    assert main(["train", str(config), "--overwrite", "seed=5"]) == 0
    assert metrics_of(tmp_path / "run")["seed"] == 5
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith("run")} == {"run"}


def test_a_folder_that_is_no_run_is_never_touched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine", encoding="utf-8")
    assert "is no run; it stays as it is" in refused(capsys, "train", config, "--overwrite")
    assert (tmp_path / "run" / "thesis.txt").read_text(encoding="utf-8") == "mine"


def test_resume_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path, training={"max_steps": 40}, pruning={"prune_end": 0.6})
    assert main(["train", str(config), f"output_dir={tmp_path / 'whole'}"]) == 0
    after_step = Controller.after_step

    def stop_at_17(controller: Controller) -> None:
        after_step(controller)
        if controller.step == 17:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Controller, "after_step", stop_at_17)
        assert main(["train", str(config), "save_steps=10"]) == 130
    assert not (tmp_path / "run").exists()
    assert "unfinished run; give --resume" in refused(capsys, "train", config)
    assert "training.learning_rate is 0.5, but the unfinished run has" in refused(
        capsys, "train", config, "--resume", "learning_rate=0.5"
    )
    assert main(["train", str(config), "--resume", "save_steps=10"]) == 0
    whole, resumed = ((tmp_path / name / "metrics.json").read_bytes() for name in ("whole", "run"))
    assert resumed == whole
    assert efficiency_of(tmp_path / "run")["resumed_from_step"] == 10
    plans = [
        [(event["step"], event["prune"], event["rank"]) for event in read_jsonl(tmp_path / name / "events.jsonl")]
        for name in ("whole", "run")
    ]
    assert plans[0] == plans[1]
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "run")]
    assert weights[0] == weights[1]
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_resume_without_a_checkpoint_starts_fresh(tmp_path: Path) -> None:
    config = write_config(tmp_path, training={"max_steps": 20})
    (tmp_path / "run.partial").mkdir()
    assert main(["train", str(config), "--resume"]) == 0
    assert "resumed_from_step" not in efficiency_of(tmp_path / "run")


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and time of every file below a folder, and the times of the folders."""
    files = {path: path.read_bytes() if path.is_file() else b"" for path in sorted(folder.rglob("*"))}
    return {str(path): (data, path.stat().st_mtime_ns) for path, data in files.items()}


def test_resume_on_a_finished_run_says_so_and_changes_nothing(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(finished)
    for overrides, words in (([], ""), (["seed=9"], "training.seed is 9, but the finished run has 0")):
        assert main(["train", str(finished / "config.yaml"), "--resume", *overrides]) == 0
        said = capsys.readouterr().err
        assert "holds a finished run; there is nothing to resume" in said
        assert words in said
        assert ("other settings" in said) == bool(words)
        assert contents(finished) == before


def test_a_run_that_only_waits_for_its_name_gets_it(finished: Path, tmp_path: Path) -> None:
    """Stopped between its last file and its name, with the run it replaces moved aside already."""
    shutil.copytree(finished / "run", tmp_path / "run.partial")
    shutil.copytree(finished / "run", tmp_path / "run.replaced")
    (tmp_path / "run.partial/checkpoints").mkdir()
    command = ["train", str(finished / "config.yaml"), f"output_dir={tmp_path / 'run'}", "--resume"]
    assert main(command) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
    assert metrics_of(tmp_path / "run") == metrics_of(finished / "run")
    assert not (tmp_path / "run/checkpoints").exists()


def test_lora_prunes_nothing(tmp_path: Path) -> None:
    config = write_config(tmp_path, training={"max_steps": 20})
    assert main(["train", str(config), "--overwrite", "method=lora"]) == 0
    metrics = metrics_of(tmp_path / "run")
    assert (metrics["num_events"], metrics["sparsity"], metrics["target_sparsity"]) == (0, 0.0, 0.0)
    assert metrics["params_after"] == metrics["params_before"]
    assert not (tmp_path / "run" / "event_timing.json").exists()


def test_a_loss_that_is_nan_stops_and_keeps_the_last_good_state(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path)
    error = refused(capsys, "train", config, "learning_rate=1e38", "max_grad_norm=0", "warmup_ratio=0")
    assert "NaN" in error or "nan" in error
    checkpoints = list((tmp_path / "run.partial" / "checkpoints").iterdir())
    assert len(checkpoints) == 1
    assert str(checkpoints[0]) in error
    assert (checkpoints[0] / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["target_sparsty=0.5"], ["unknown key 'target_sparsty'", "pruning.target_sparsity"]),
        (["target_sparsity=1.5"], ["target_sparsity must be in [0, 1), got 1.5"]),
        (["target_sparsity=0.9", "min_neurons=64"], ["target_sparsity 0.9 is not reachable", "min_neurons=64"]),
        (["max_steps=3"], ["a run of 3 steps is too short"]),
        (["target_modules=[nothing]"], ["'nothing' matches no linear layer"]),
        (["model=./no_such_folder"], ["model: there is no folder ./no_such_folder"]),
        (["model=package:no_such_package/model"], ["pip install --no-deps no-such-package"]),
        (["data.datasets=nothing.csv"], ["there is no file or folder nothing.csv"]),
        (["label_column=class"], ["no column 'class'; there are text, label"]),
        (["device=tpu"], ["hardware.device must be one of"]),
        (["--fast"], ["unknown argument --fast"]),
        (["seed"], ["an override is written key=value, got 'seed'"]),
    ],
)
def test_mistakes_end_in_one_line(
    finished: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], words: list[str]
) -> None:
    error = refused(capsys, "train", finished / "config.yaml", f"output_dir={finished / 'wrong'}", *overrides)
    assert all(word in error for word in words), error


def test_an_architecture_that_is_unknown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import MPNetConfig, MPNetModel

    size = {
        "vocab_size": 47,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    MPNetModel(MPNetConfig(**size)).save_pretrained(tmp_path / "unknown")
    tiny_tokenizer().save_pretrained(tmp_path / "unknown")
    config = write_config(tmp_path)
    error = refused(capsys, "train", config, f"model={tmp_path / 'unknown'}")
    assert all(word in error for word in ("'mpnet'", "bert", "llama", "to add one"))


def test_a_row_that_is_broken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path)
    rows = (tmp_path / "rows.csv").read_text(encoding="utf-8").splitlines()
    (tmp_path / "rows.csv").write_text("\n".join([*rows[:9], "word1,5", *rows[10:]]), encoding="utf-8")
    error = refused(capsys, "train", config, "num_labels=2")
    assert "rows.csv, line 10, column 'label': label 5 is out of range" in error


NUMBERED, NAMED = [("good word1", "0"), ("bad word1", "1")], [("good word1", "pos"), ("bad word1", "neg")]


@pytest.mark.parametrize(
    ("splits", "words"),
    [
        ({"train": NUMBERED, "test": []}, "test.csv is empty; it has no rows"),
        ({"train": [], "test": NUMBERED}, "train.csv is empty; it has no rows"),
        ({"test": NUMBERED}, "holds no train file"),
        ({"train": NUMBERED, "test": [("word2", "2")]}, "test.csv, line 2, column 'label': label 2 is out of range"),
        ({"train": NAMED, "test": [("word2", "neutral")]}, "label 'neutral' is not one of neg, pos, the labels of the"),
        ({"train": NUMBERED, "test": NAMED}, "test.csv, line 2, column 'label': label 'pos' is not a whole number"),
    ],
    ids=["empty test", "empty train", "no train", "another number", "another name", "names for numbers"],
)
def test_splits_that_do_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], splits: dict[str, list[tuple[str, ...]]], words: str
) -> None:
    config = write_config(tmp_path)
    (tmp_path / "data").mkdir()
    for name, rows in splits.items():
        write_csv(tmp_path / "data" / f"{name}.csv", rows)
    error = refused(capsys, "train", config, f"data.datasets={tmp_path / 'data'}", "test_size=null")
    assert words in error
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith("run")]


def test_an_export_that_is_truncated(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    shutil.copytree(finished / "run" / "model", folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert "truncated" in refused(capsys, "eval", folder, finished / "config.yaml")
    assert "is not an export" in refused(capsys, "eval", finished, finished / "config.yaml")


def test_wrong_commands_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "invalid choice: 'trian'" in refused(capsys, "trian", "x.yaml")
    assert "there is no file" in refused(capsys, "train", tmp_path / "x.yaml")
    assert "holds no finished run" in refused(capsys, "report", tmp_path)
    assert "unknown argument extra" in refused(capsys, "report", tmp_path, "extra")


def test_the_command_itself(tmp_path: Path) -> None:
    done = shell("train", tmp_path / "x.yaml")
    assert done.returncode == 2
    assert done.stderr == f"apt: error: config: there is no file {tmp_path / 'x.yaml'}\n"
    assert (
        "Traceback"
        in subprocess.run(
            [sys.executable, "-m", "apt", "report", str(tmp_path)],
            cwd=ROOT,
            env={**os.environ, "APT_TRACEBACK": "1"},
            capture_output=True,
            text=True,
            check=False,
        ).stderr
    )
