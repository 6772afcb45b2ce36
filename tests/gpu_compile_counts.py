"""Count what the tests of the kernels compile on a GPU, without one. Prints JSON: all of them, and those new in a file.

    TRITON_INTERPRET=1 PYTHONPATH=. python tests/gpu_compile_counts.py [pytest's arguments]

By default it runs what `make gpu` does, in the interpreter, so to the end of each test; but the persistent kernels in
bfloat16, which that gets wrong, fail. Each launch is bound as Triton binds it on sm_90: kernel, types, what 16 divides,
constants, warps and stages, with the tiles of sm_90. What is bound alike is compiled once.
"""

import json
import sys
from collections import Counter
from typing import Any

import pytest
from stub_driver import MACHINES, StubDriver
from triton.runtime import driver
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from apt_kernels import _triton, passes

MACHINE = "sm_90"
AS_ON_A_GPU = ["tests/kernels", "-m", "gpu or not slow", "--pairs", "-q", "-p", "no:cacheprovider"]
COMPILE_AHEAD = ["--ignore-glob=*ahead*", "--ignore-glob=*compile*"]


class Bound:
    """What was bound so far, and by which test file first."""

    def __init__(self) -> None:
        self.file = ""
        self.first: dict[tuple[Any, ...], str] = {}
        self.kernels: dict[InterpretedFunction, JITFunction] = {}

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        self.file = item.path.stem
        passes._compiled.clear()  # each file has a process of its own

    def bind(self, interpreted: InterpretedFunction, args: tuple[Any, ...], constants: dict[str, Any]) -> None:
        if interpreted not in self.kernels:
            fixed = interpreted.kwargs["do_not_specialize"]
            self.kernels[interpreted] = JITFunction(interpreted.fn, do_not_specialize=fixed)
        kernel = self.kernels[interpreted]
        if "WIDEN" in constants:  # which only the interpreter needs
            constants = constants | {"WIDEN": False}
        *_, binder = kernel.device_caches[0]
        _, specialization, options = binder(*args, **constants)
        name = f"{kernel.fn.__module__}.{kernel.fn.__qualname__}"
        self.first.setdefault((name, str(specialization), str(options)), self.file)


def count(arguments: list[str]) -> tuple[int, dict[str, int]]:
    """Pytest's status, and the compilations that are new in each file."""
    bound, run, is_first = Bound(), InterpretedFunction.run, passes.is_first

    def noted(self: InterpretedFunction, *args: Any, grid: Any, warmup: bool, **constants: Any) -> Any:
        bound.bind(self, args, constants)
        return run(self, *args, grid=grid, warmup=warmup, **constants)

    def first_as_compiled(*args: Any) -> bool:
        interpreted, _triton.interpreted = _triton.interpreted, lambda: False
        try:
            return is_first(*args)
        finally:
            _triton.interpreted = interpreted

    driver.set_active(StubDriver(MACHINE))
    InterpretedFunction.run, passes.is_first = noted, first_as_compiled
    machine = MACHINES[MACHINE]
    _triton.arch, _triton.programs = (lambda device: machine.tiles), (lambda device: machine.programs)
    status = pytest.main(arguments, plugins=[bound])
    return status, dict(Counter(bound.first.values()))


if __name__ == "__main__":
    status, counts = count(sys.argv[1:] or [*AS_ON_A_GPU, *COMPILE_AHEAD])
    print(json.dumps({"all": sum(counts.values()), **counts}))
    sys.exit(status)
