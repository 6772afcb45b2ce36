"""Damaged files of every kind, five hundred a run: refused in one line, or read as if they were whole."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.fuzz
@pytest.mark.timeout(600)
def test_five_hundred_damaged_files(tmp_path: Path) -> None:
    """In a process of its own, whose audit hook stays. FUZZ_SEED draws others."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    line = [sys.executable, ROOT / "tests/fuzzing.py", tmp_path / "f", "--seed", os.environ.get("FUZZ_SEED", "0")]
    done = subprocess.run(list(map(str, line)), env=environment, capture_output=True, text=True, check=False)
    # Damaged tokenizers let their library write lines of its own, from below Python.
    rows = [json.loads(row) for row in done.stdout.splitlines() if row.startswith("{")]
    assert rows, done.stderr[-2000:]
    assert rows[-1] == {"trials": 500, "faults": 0}, "\n".join(map(str, rows))
