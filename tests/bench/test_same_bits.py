"""The comparison of two trees: what it sees, what it lets pass, and which runs it makes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from apt.apt_config import ABLATIONS
from apt.families import FAMILIES
from apt.methods import METHODS
from apt.runs.tasks import TASKS
from bench import same_bits
from bench.same_bits_cases import Case, all_cases

EVENT: dict[str, Any] = {"step": 4, "prune": {"kept": {"layers.0.heads": [0, 2]}}, "sparsity": 0.3, "seconds": 0.01}
METRICS: dict[str, Any] = {"accuracy": 0.1, "versions": {"commit": "aaaaaaa", "torch": "2"}}


def write_run(
    folder: Path, *, weight: float = 1.0, event: dict[str, Any] = EVENT, metrics: dict[str, Any] = METRICS
) -> Path:
    (folder / "model").mkdir(parents=True)
    tensors = {"a": torch.tensor([[weight, 2.0]]), "b": torch.ones(3, dtype=torch.bfloat16)}
    save_file(tensors, folder / "model" / "model.safetensors")
    (folder / "events.jsonl").write_text(json.dumps(EVENT) + "\n" + json.dumps(event) + "\n", encoding="utf-8")
    (folder / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    (folder / "efficiency.json").write_text(json.dumps({"train_seconds": id(folder)}), encoding="utf-8")
    return folder


def changed(folder: Path, **changes: Any) -> list[tuple[str, str, str]]:
    """What is seen between a run and one that differs by some changes."""
    here, there = write_run(folder / "here", **changes), write_run(folder / "there")
    return same_bits.differences(same_bits.contents(here), same_bits.contents(there))


def test_the_last_bit_of_a_weight_is_seen(tmp_path: Path) -> None:
    nearest = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0)).item()
    ((key, ours, theirs),) = changed(tmp_path, weight=nearest)
    assert key == "model/model.safetensors a"
    assert ours != theirs


def test_a_unit_that_an_event_kept_is_seen(tmp_path: Path) -> None:
    event = {**EVENT, "prune": {"kept": {"layers.0.heads": [0, 3]}}}
    assert changed(tmp_path, event=event) == [("events.jsonl 1.prune.kept.layers.0.heads", "[0, 3]", "[0, 2]")]


def test_the_last_bit_of_a_metric_and_a_new_key_are_seen(tmp_path: Path) -> None:
    metrics = {**METRICS, "accuracy": 0.1 + 2**-56, "f1": None}
    assert changed(tmp_path, metrics=metrics) == [
        ("metrics.json accuracy", "0.10000000000000002", "0.1"),
        ("metrics.json f1", "null", "nothing"),
    ]


def test_times_and_versions_pass(tmp_path: Path) -> None:
    metrics = {**METRICS, "versions": {"commit": "bbbbbbb", "torch": "2"}}
    assert changed(tmp_path, event={**EVENT, "seconds": 0.02}, metrics=metrics) == []


def test_a_file_that_is_missing_is_seen(tmp_path: Path) -> None:
    here, there = write_run(tmp_path / "here"), write_run(tmp_path / "there")
    (here / "model" / "model.safetensors").unlink()
    found = same_bits.differences(same_bits.contents(here), same_bits.contents(there))
    assert [(key, ours) for key, ours, _ in found] == [(f"model/model.safetensors {name}", "nothing") for name in "ab"]


COMMAND = """
import sys, time
from pathlib import Path
from apt import ACCURACY
run = Path(sys.argv[-1].partition("=")[2])
checkpoint = run.with_name("run.partial") / "checkpoints" / "checkpoint-2"
if "broken" in sys.argv:
    sys.exit("a planted fault")
if "long" in sys.argv and "--resume" not in sys.argv:
    checkpoint.mkdir(parents=True)
    time.sleep(60)
run.mkdir()
changing = ACCURACY if "changing" in sys.argv else 0.5
text = '{"accuracy": %s, "resumed": %s}' % (changing, str(checkpoint.exists()).lower())
(run / "metrics.json").write_text(text)
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A package of the name of ours, whose accuracy is another in the tree than in the commit."""
    root = tmp_path / "repository"
    for name, text in {"apt/__init__": "ACCURACY = 0.75", "apt/__main__": COMMAND, "apt_kernels/__init__": ""}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / f"{name}.py").write_text(text, encoding="utf-8")
    who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "first"]):
        subprocess.run(["git", *who, *words], cwd=root, check=True)
    (root / "apt" / "__init__.py").write_text("ACCURACY = 0.5", encoding="utf-8")
    return root


def test_each_side_runs_its_own_code(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("steady", "changing", "broken", "long")
    cases = [Case(name=name, config="toy.yaml", overrides=(name,), killed=name == "long") for name in names]
    assert same_bits.compare(cases, "HEAD", repository) == ["steady", "long"]
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    place = lines.index("metrics.json accuracy")
    assert lines[place + 1 : place + 3] == ["here: 0.5", "HEAD: 0.75"]
    assert lines.count("a planted fault") == 2
    (resumed,) = (line for line in lines if line.startswith("identical  long"))
    assert "2 values" in resumed


def test_a_run_that_is_over_before_it_is_killed_is_no_proof(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert same_bits.compare([Case(name="steady", config="toy.yaml", killed=True)], "HEAD", repository) == []
    assert "it was over before it could be killed" in capsys.readouterr().out


def test_a_package_of_elsewhere_and_an_unknown_revision_are_refused(repository: Path) -> None:
    with pytest.raises(SystemExit, match="git has no files of v99"):
        same_bits.compare([], "v99", repository)
    (repository / "apt_kernels" / "__init__.py").unlink()
    with pytest.raises(SystemExit, match="here must run what stands in"):
        same_bits.compare([], "HEAD", repository)


@pytest.mark.parametrize(("same", "code"), [(["bert"], 1), (["bert", "t5"], 0)])
def test_the_last_line_and_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], same: list[str], code: int
) -> None:
    monkeypatch.setattr(same_bits, "compare", lambda *_: same)
    monkeypatch.setattr(sys, "argv", ["same_bits", "--only", "t5", "bert"])
    assert same_bits.main() == code
    assert capsys.readouterr().out == f"{len(same)} of 2 cases are identical\n"


def test_every_family_method_ablation_and_task_has_a_run() -> None:
    cases = all_cases()
    settings = {text for case in cases for text in case.overrides}
    assert len({case.name for case in cases}) == len(cases)
    assert {case.model for case in cases} >= {name for family in FAMILIES for name in family.model_types}
    assert settings >= {f"model.method={name}" for name in METHODS if name != "apt"}
    assert settings >= {f"ablation={name}" for name in ABLATIONS if name != "full"}
    assert {case.task for case in cases} >= set(TASKS)


def test_it_imports_nothing_of_ours() -> None:
    code = "import sys, bench.same_bits; print([name for name in sys.modules if name.partition('.')[0] == 'apt'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=same_bits.ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
