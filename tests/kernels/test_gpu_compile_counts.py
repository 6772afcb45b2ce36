"""The tests of the kernels compile so little on a GPU that a run of them ends in a minute or two."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
MOST = 300  # compilations of about 0.6 s, by all processes of a run


@pytest.mark.slow  # runs them all, in the interpreter
@pytest.mark.timeout(1800)
def test_the_gpu_tests_compile_little() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / "tests/gpu_compile_counts.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    counts = json.loads(done.stdout.splitlines()[-1])
    assert 100 < counts["all"] <= MOST, counts
