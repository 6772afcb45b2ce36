"""Compile for sm_90, without a GPU and in threads as the first run does, all that it launches. A JSON line a kernel.

    PYTHONPATH=. python tests/compile_first_run.py

What fails to compile is a line with its name and the error. TRITON_INTERPRET must not be set.
"""

import json

import torch
from stub_driver import compiling_for, resources

from bench.kernels.ahead import compile_all, launches
from bench.kernels.device import jit_functions
from bench.kernels.plan import FULL

MACHINE = "sm_90"


def main() -> None:
    with compiling_for(MACHINE):
        failed = compile_all(launches(FULL, torch.bfloat16), torch.device("cuda"))
    for name, error in failed.items():
        print(json.dumps({"failed": name, "error": str(error)}), flush=True)
    for kernel in jit_functions():
        for cache, *_ in kernel.device_caches.values():
            for binary in cache.values():
                print(json.dumps(resources(MACHINE, kernel, binary, disassemble=True)._asdict()), flush=True)


if __name__ == "__main__":
    main()
