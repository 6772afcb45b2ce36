"""Once a step has run, no rank, number of tokens or pruned width compiles anything. No GPU is needed.

What is launched stands in `compile_counts.py`. It runs in a process of its own: this one may run Triton's interpreter.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).parent.parent / "compile_counts.py"
CHANGES = ("ranks", "tokens", "widths", "all at once")

Counts = dict[str, dict[str, int]]


@pytest.fixture(scope="module")
def counts() -> Counts:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(SCRIPT.parent.parent)
    done = subprocess.run([sys.executable, SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("implementation", ["split_cublas", "split_triton", "one_kernel"])
@pytest.mark.parametrize("options", ["masked", "plain"])
def test_the_linear_compiles_at_its_first_step_alone(counts: Counts, implementation: str, options: str) -> None:
    own = counts[f"{implementation}, {options}"]
    assert [own[change] for change in CHANGES] == [0, 0, 0, 0]


@pytest.mark.parametrize("name", ["group", "statistics, norm, activation", "kurtosis"])
def test_the_other_kernels_do_too(counts: Counts, name: str) -> None:
    assert counts[name]["later"] == 0


def test_the_counter_counts(counts: Counts) -> None:
    assert counts["split_cublas, masked"]["first"] > 10
    assert counts["another dtype"]["first"] == 0
    assert counts["another dtype"]["later"] > 5  # the same step in float16
    assert counts["kurtosis"]["first"] > 0
