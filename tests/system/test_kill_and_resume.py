"""Runs killed with SIGKILL at a random place and resumed end with weights and metrics of one that was left alone."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


AT_A_FILE = ["--kills", "1", "--seed", "3"]
IN_BACKWARD = ["--kills", "1", "--first", "6", "--seed", "1", "--distil"]
BOTH = """
import json, sys
from pathlib import Path
import kill_and_resume as script

assert script.every_trap_finds_its_place(Path(sys.argv[1], "traps.log"))
sys.exit(max(script.main(given) for given in json.loads(sys.argv[2])))
"""


def kill_and_resume(folder: Path, *arguments: object) -> list[dict[str, Any]]:
    return rows_of(ROOT / "tests/kill_and_resume.py", folder, *arguments)


def rows_of(*command: object) -> list[dict[str, Any]]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    line = [sys.executable, *map(str, command)]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert rows, done.stderr
    assert done.returncode == 0, rows
    return rows


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A folder and the rows of two trials, by one process, which also looks whether every trap finds its place."""
    folder = tmp_path_factory.mktemp("killed")
    plain, taught = folder / "plain", folder / "taught"
    for each in (plain, taught):
        each.mkdir()
    given = [[str(plain), *AT_A_FILE], [str(taught), *IN_BACKWARD]]
    return taught, rows_of("-c", BOTH, folder, json.dumps(given))


def test_killed_halfway_through_a_file(killed: tuple[Path, list[dict[str, Any]]]) -> None:
    """In the second epoch: the file that was cut is of no consequence, nor is what the first epoch drew."""
    row, _ = killed[1]
    (kill,) = row["kills"]
    assert kill["place"] == "file"
    assert kill["killed"]
    assert kill["step"] > 24 + 7
    assert row["weights_equal"]
    assert row["events_equal"]
    assert row["metrics_equal"]


def test_killed_while_it_distils(killed: tuple[Path, list[dict[str, Any]]]) -> None:
    """Killed in a backward pass after the first event, so that the teacher comes out of a checkpoint."""
    folder, (_, row) = killed
    (kill,) = row["kills"]
    assert (kill["place"], kill["killed"]) == ("backward", True)
    assert 13 + 7 < kill["step"] < 25
    assert row["metrics_equal"]
    metrics = json.loads((folder / "killed6/metrics.json").read_text(encoding="utf-8"))
    assert metrics["self_distillation"]["teacher_of_steps"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_twenty_kills(tmp_path: Path) -> None:
    rows = kill_and_resume(tmp_path, "--kills", 20, "--seed", 1)
    assert len(rows) == 20
    assert all(row["ok"] for row in rows)
