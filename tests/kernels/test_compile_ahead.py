"""Every tile that selection can choose compiles for the machines of `stub_driver.py`, and fits. No GPU is needed.

By default those of one machine and the largest of others; all of them with `-m slow`. What is compiled stands in
`compile_ahead.py`. It runs in a process of its own: this one may run Triton's interpreter.
"""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from apt_kernels import _triton

pytest.importorskip("triton")
pytestmark = pytest.mark.timeout(900)  # a busy machine compiles for minutes
SCRIPT = Path(__file__).parent.parent / "compile_ahead.py"
SHARED_BYTES = {  # that a program may have
    **{"sm_90": 232448, "sm_80": 166912, "gfx942": 65536},
    **{"sm_100": 232448, "sm_89": 101376, "sm_120": 101376},
}
PRODUCTS = {"forward", "backward", "one_kernel", "forward_tma", "backward_tma"}
OTHERS = {"gate_kernel", "activation_backward_kernel", "tile_moments_kernel", "join_kernel"}
OTHERS |= {"norm_forward_kernel", "norm_backward_kernel", "norm_backward_wide_kernel", "norm_weight_kernel"}
SKINNY = {"pack", "reduce", "down", "up_backward", "rank_gradient", "down_backward"}
PEAKS = SKINNY | {"forward", "backward", "norm_backward_kernel", "tile_moments_kernel"}  # that take most
SAMPLED = ("sm_80", "gfx942", "sm_120")
MOST_CASES, MOST_OF_ALL = 110, 180

Rows = list[dict[str, Any]]


def compile_ahead(cache: Path, *flags: str, python: str = sys.executable) -> Rows:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(SCRIPT.parent.parent)}
    done = subprocess.run([python, SCRIPT, *flags], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(rows: Rows) -> None:
    def those(wrong: Any) -> Rows:
        return [row for row in rows if wrong(row)]

    assert not those(spills)
    assert not those(lambda row: row["shared_bytes"] > SHARED_BYTES[row["machine"]])
    assert not those(lambda row: row["atomics"])
    assert not those(lambda row: needs_wgmma(row) and not row["wgmma"])


def spills(row: dict[str, Any]) -> bool:
    """Some get a value or two on the stack from ptxas while half of the registers are free: that is no spill."""
    at_leisure = row["machine"] in ("sm_89", "sm_100", "sm_120") and row["registers"] <= 128
    return row["spilled"] > (32 if at_leisure else 0)


def needs_wgmma(row: dict[str, Any]) -> bool:
    """16-bit products on sm_90; of the narrow kernels all but dA at 16 ranks, a tile with fewer rows than wgmma has."""
    if row["machine"] != "sm_90" or row["dtype"] not in ("bf16", "fp16"):
        return False
    if row["kernel"] in ("down", "up_backward", "down_backward"):
        return row["constants"]["BM"] == 64 and (row["kernel"], row["constants"]["BR"]) != ("down_backward", 16)
    return row["kernel"] in PRODUCTS


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    return compile_ahead(tmp_path_factory.mktemp("triton"))


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    return compile_ahead(tmp_path_factory.mktemp("triton"), "--every")


def test_nothing_spills_and_everything_fits(rows: Rows) -> None:
    check(rows)
    assert any(needs_wgmma(row) for row in rows)


def kernels_by_machine(rows: Rows) -> dict[str, set[str]]:
    return {machine: {row["kernel"] for row in rows if row["machine"] == machine} for machine in SHARED_BYTES}


def variants(rows: Rows) -> Counter[tuple[str, str, str, int]]:
    """Masked as they are, a kernel has as many as it has tiles and rank blocks."""
    return Counter((row["machine"], row["kernel"], row["dtype"], row["constants"].get("UNIT", 8)) for row in rows)


def test_every_kernel_is_among_them(rows: Rows) -> None:
    assert len(rows) <= MOST_CASES
    kernels = kernels_by_machine(rows)
    assert kernels["sm_90"] >= PRODUCTS | SKINNY | OTHERS
    for machine in SAMPLED:
        assert kernels[machine] >= PEAKS


def test_every_tile_and_rank_block_is_among_them(rows: Rows) -> None:
    every_choice(variants(rows), "sm_90", 3)
    assert {variants(rows)["sm_90", kernel, "bf16", 8] for kernel in ("forward_tma", "backward_tma")} == {2}


def every_choice(seen: Counter[tuple[str, str, str, int]], machine: str, number: int) -> None:
    """The tiles of a machine, so many, and the rank blocks."""
    assert seen[machine, "backward", "bf16", 8] >= number
    assert seen[machine, "one_kernel", "bf16", 8] == (2 * number if machine == "sm_90" else 1)
    assert seen[machine, "down", "bf16", 8] >= 2


def test_what_is_left_out_by_default_has_the_tiles_of_another() -> None:
    """But sm_100, which takes longest."""
    assert SHARED_BYTES.keys() - {"sm_90", *SAMPLED} == {"sm_89", "sm_100"}
    small, young = _triton.nvidia_arch(8, SHARED_BYTES["sm_89"]), _triton.nvidia_arch(12, SHARED_BYTES["sm_120"])
    assert small == young


def test_the_judge_sees_what_it_is_for(rows: Rows) -> None:
    product = next(row for row in rows if row["kernel"] == "forward" and row["machine"] == "sm_90")
    for fault in ({"spilled": 8}, {"shared_bytes": 232449}, {"atomics": 1}, {"wgmma": False}):
        with pytest.raises(AssertionError):
            check([{**product, **fault}])
    young = {**product, "machine": "sm_120", "wgmma": False, "shared_bytes": 0, "spilled": 8}
    check([{**young, "registers": 96}])
    with pytest.raises(AssertionError):
        check([{**young, "registers": 255}])


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_machine_has_all_of_them(every: Rows) -> None:
    check(every)
    assert len(every) <= MOST_OF_ALL
    kernels, seen = kernels_by_machine(every), variants(every)
    for machine in ("sm_80", "gfx942"):
        assert {kernel for kernel in PRODUCTS if not kernel.endswith("_tma")} | SKINNY | OTHERS <= kernels[machine]
        every_choice(seen, machine, 2)
    for machine in ("sm_89", "sm_100", "sm_120"):
        assert kernels[machine] >= PEAKS
    assert seen["sm_80", "forward", "fp32", 8]
    assert seen["sm_80", "forward", "bf16", 1]


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_all_flags_and_dtypes(tmp_path: Path) -> None:
    check(compile_ahead(tmp_path, "--full"))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_triton_3_6(tmp_path: Path) -> None:
    """The oldest Triton that is supported, in its own environment. Torch, which only gives shapes, is this one's."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = str(tmp_path / "venv/bin/python")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "triton==3.6.0"], check=True)
    site = subprocess.check_output([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True)
    Path(site.strip(), "zzz_torch.pth").write_text(sysconfig.get_path("purelib"))
    version = subprocess.check_output([python, "-c", "import triton; print(triton.__version__)"], text=True)
    assert version.strip() == "3.6.0"
    check(compile_ahead(tmp_path / "cache", "--every", python=python))
