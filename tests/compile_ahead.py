"""Compile the kernels for every machine, without one, and print what each takes, a JSON line a compilation.

    PYTHONPATH=. python tests/compile_ahead.py            every tile for sm_90, a sample for others
    PYTHONPATH=. python tests/compile_ahead.py --every    every tile that selection can choose
    PYTHONPATH=. python tests/compile_ahead.py --full     all flags, dtypes and alignments

Default: on sm_90 every tile of every kernel, in bfloat16, masks and bias on; on sm_80, gfx942 and sm_120 the largest of
those kernels that take most. With --every, on sm_80 and gfx942 every tile of the linear's (on sm_80 in float32 and
unaligned too) and one of the others, and the largest on all other machines. All as their launchers launch them.
TRITON_INTERPRET must not be set.
"""

import json
import sys
from itertools import product
from typing import Any
from unittest import mock

from lora_launches import BF16, FP16, FP32, MASKED, PLAIN, backward, forward, group_step, step
from pass_launches import ROWS, each_tile, every_variant, norm_backward, norm_forward, weight_kurtosis
from stub_driver import MACHINES, compiling_for, resources

from apt_kernels import passes

SIZE, UNALIGNED = (8192, 4096, 4096, 16), (8191, 4093, 4099, 16)
LARGEST = (8192, 4096, 4096, 64)  # takes the largest tiles and rank block
WHOLE = ("sm_90", "sm_80", "gfx942")
SAMPLED = ("sm_80", "gfx942", "sm_120")  # sm_89 is given the tiles of sm_120; sm_100 takes longest


def every_launch(machine: str) -> None:
    """Each tile and rank block of each kernel: a launch compiles for all of them the first time."""
    step("split_triton", SIZE)
    if machine != "sm_90":
        with launched_alone():
            forward("one_kernel", LARGEST)
    else:  # without the mask inside the loop, loads go by descriptors; the rows' gate rides along
        forward("one_kernel", SIZE)
        forward("split_triton", SIZE, {**MASKED, "mask_in": False, "gate": "row", "dropout": 0.1})
        backward("split_triton", SIZE, {**MASKED, "mask_out": False, "gate": "row", "dropout": 0.1})
    if machine == "sm_80":
        with launched_alone():
            step("split_triton", LARGEST, MASKED, FP32)
            step("split_triton", (*UNALIGNED[:3], LARGEST[3]))


def largest_launches() -> None:
    """The kernels that take most registers and shared memory, each once."""
    with launched_alone():
        step("split_triton", LARGEST)
    norm_forward(ROWS[-1])
    norm_backward(ROWS[-1])
    weight_kurtosis(4096, 4096, 16)


def launched_alone() -> Any:
    """Inside, a first launch compiles what it launches and no other choice."""
    return mock.patch.object(passes, "compile_only")


def full_launches() -> None:
    """All flags in bfloat16; masked and plain in the other dtypes, and where nothing is aligned."""
    for bias, mask_in, mask_out in product((False, True), repeat=3):
        flags = {**PLAIN, "bias": bias, "mask_in": mask_in, "mask_out": mask_out}
        step("split_triton", SIZE, flags)
        forward("one_kernel", SIZE, flags)
    for gate, dropout in [("rank", 0.0), ("row", 0.0), (None, 0.1), ("row", 0.1)]:
        for dtype in (BF16, FP32):
            step("split_cublas", SIZE, {**MASKED, "gate": gate, "dropout": dropout}, dtype)
    for size, dtype, flags in product((SIZE, UNALIGNED), (BF16, FP16, FP32), (MASKED, PLAIN)):
        step("split_triton", size, flags, dtype)
        forward("one_kernel", size, flags, dtype)
    group_step("split_triton", SIZE)


def main(every: bool, full: bool) -> None:
    for machine in MACHINES if every or full else ("sm_90", *SAMPLED):
        with compiling_for(machine) as compiled:
            if full:
                full_launches()
                every_variant()
            if full or machine == "sm_90" or (every and machine in WHOLE):
                every_launch(machine)
                each_tile(machine)
            else:
                largest_launches()
        for kernel, binary in compiled:
            print(json.dumps(resources(machine, kernel, binary, disassemble=full)._asdict()), flush=True)


if __name__ == "__main__":
    main("--every" in sys.argv, "--full" in sys.argv)
