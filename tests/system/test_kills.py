"""A few of the kills of `make kills`: it runs, finds nothing, and tells where they fell."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_three_kills_lose_nothing(tmp_path: Path) -> None:
    """Of a loop of one's own; `test_kill_and_resume.py` has those of the command."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    arguments = ["--kills", "3", "--lives", "loop", "--folder", str(tmp_path)]
    command = [sys.executable, str(ROOT / "tests/kills.py"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    *_, total, told = done.stdout.splitlines()
    # Kills of all phases, by the three ways to draw them, resumed, equal, lost, left over.
    numbers = [int(text) for text in total.split()[1:]]
    assert numbers[0] == sum(numbers[1:4]) == 3
    assert numbers[4:] == [3, 3, 0, 0]
    assert " good, " in told
