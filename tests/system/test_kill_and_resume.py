"""Runs killed with SIGKILL at a random place and resumed end with weights and metrics of one that was left alone."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def kill_and_resume(folder: Path, *arguments: object) -> list[dict[str, Any]]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    command = [sys.executable, ROOT / "tests/kill_and_resume.py", folder, *arguments]
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, check=False)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert rows, done.stderr
    assert done.returncode == 0, rows
    return rows


def test_every_trap_finds_what_it_waits_for() -> None:
    """In a process of its own, as a trap replaces a function."""
    arm = "import kill_and_resume as k, random; [k.set_trap(place, 1, random.Random(0)) for place in k.PLACES]"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    done = subprocess.run([sys.executable, "-c", arm], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_killed_halfway_through_a_file(tmp_path: Path) -> None:
    """In the second epoch: the file that was cut is of no consequence, nor is what the first epoch drew."""
    (row,) = kill_and_resume(tmp_path, "--kills", 1, "--seed", 3)
    (kill,) = row["kills"]
    assert kill["place"] == "file"
    assert kill["killed"]
    assert kill["step"] > 24 + 7
    assert row["weights_equal"]
    assert row["events_equal"]
    assert row["metrics_equal"]


def test_killed_while_it_distils(tmp_path: Path) -> None:
    """Killed in a backward pass after the first event, so that the teacher comes out of a checkpoint."""
    (row,) = kill_and_resume(tmp_path, "--kills", 1, "--first", 6, "--seed", 1, "--distil")
    (kill,) = row["kills"]
    assert (kill["place"], kill["killed"]) == ("backward", True)
    assert 13 + 7 < kill["step"] < 25
    assert row["metrics_equal"]
    metrics = json.loads((tmp_path / "killed6/metrics.json").read_text(encoding="utf-8"))
    assert metrics["self_distillation"]["teacher_of_steps"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_twenty_kills(tmp_path: Path) -> None:
    rows = kill_and_resume(tmp_path, "--kills", 20, "--seed", 1)
    assert len(rows) == 20
    assert all(row["ok"] for row in rows)
