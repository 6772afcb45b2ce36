"""All that the first run on a GPU launches compiles for sm_90, other tiles too: nothing fails, spills or is too large.

What is compiled stands in `compile_first_run.py`, in a process of its own: this one may run the interpreter of Triton.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.kernels.sweep import TILES

pytest.importorskip("triton")
SCRIPT = Path(__file__).parent.parent / "compile_first_run.py"
SHARED_BYTES = 232448  # that a program on sm_90 may have
LARGE = {"forward", "backward", "one_kernel", "forward_tma", "backward_tma"}
SMALL = {"pack", "reduce", "rank_gradient", "gate_kernel", "activation_forward_kernel", "activation_backward_kernel"}
SMALL |= {"norm_forward_kernel", "norm_backward_kernel", "tile_moments_kernel", "join_kernel"}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_what_the_first_run_launches_compiles_and_fits(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(SCRIPT.parent.parent)}
    done = subprocess.run([sys.executable, SCRIPT], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert not [row for row in rows if "failed" in row]
    assert not [row for row in rows if row["spilled"] or row["atomics"] or row["shared_bytes"] > SHARED_BYTES]
    assert {row["kernel"] for row in rows} >= LARGE | SMALL
    seen = {(row["kernel"], row["constants"].get("BR"), *sizes_of(row)) for row in rows}
    wanted = {(kernel, block, *tile) for (kernel, block), tried in TILES.items() for tile in tried}
    assert not wanted - seen


def sizes_of(row: dict[str, object]) -> tuple[object, ...]:
    """The tile of a compiled kernel, 0 for what it has not."""
    constants: dict[str, int] = row["constants"]  # type: ignore[assignment]
    return (*(constants.get(name, 0) for name in ("BM", "BN", "BK")), row["warps"], row["stages"])
