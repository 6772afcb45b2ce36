"""Runs that are killed with SIGKILL at a random place and resumed end with the weights of one that was left alone."""

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


def test_killed_halfway_through_a_file(tmp_path: Path) -> None:
    """In the second epoch: the file that was cut is of no consequence, nor is what the first epoch drew."""
    (row,) = kill_and_resume(tmp_path, "--kills", 1, "--seed", 3)
    (kill,) = row["kills"]
    assert kill["place"] == "file"
    assert kill["killed"]
    assert kill["step"] > 24 + 7
    assert row["weights_equal"]
    assert row["events_equal"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_twenty_kills(tmp_path: Path) -> None:
    rows = kill_and_resume(tmp_path, "--kills", 20, "--seed", 1)
    assert len(rows) == 20
    assert all(row["ok"] for row in rows)
