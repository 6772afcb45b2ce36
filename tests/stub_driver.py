"""A stub in place of Triton's driver: kernels compile as they would be launched, none runs, no GPU is needed.

To be imported where TRITON_INTERPRET is not set, so in a process of its own: pytest's runs the interpreter.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from apt_kernels import _triton

BINARIES = Path(triton.__file__).parent / "backends/nvidia/bin"


class Machine(NamedTuple):
    """What is compiled for, its multiprocessors, and the shared memory a program may have."""

    target: GPUTarget
    programs: int
    shared_bytes: int

    @property
    def tiles(self) -> str:
        """The kind of machine that tiles are chosen for."""
        if self.target.backend == "hip":
            return str(self.target.arch)
        return _triton.nvidia_arch(self.target.arch // 10, self.shared_bytes)


MACHINES = {
    "sm_90": Machine(GPUTarget("cuda", 90, 32), 132, 232448),
    "sm_80": Machine(GPUTarget("cuda", 80, 32), 108, 166912),
    "gfx942": Machine(GPUTarget("hip", "gfx942", 64), 304, 65536),
    "sm_89": Machine(GPUTarget("cuda", 89, 32), 128, 101376),
    "sm_100": Machine(GPUTarget("cuda", 100, 32), 148, 232448),
    "sm_120": Machine(GPUTarget("cuda", 120, 32), 170, 101376),
}


class StubDriver:
    """What a launch asks of the driver before it launches. Every machine is a device, so each has its own cache."""

    def __init__(self, machine: str) -> None:
        self.machine = machine

    def get_current_device(self) -> int:
        return list(MACHINES).index(self.machine)

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return MACHINES[self.machine].target


Compilation = tuple[JITFunction, Any]  # the kernel and what it compiled to


@contextmanager
def compiling_for(machine: str) -> Iterator[list[Compilation]]:
    """Every launch compiles for this machine, and nothing else. Yields what was compiled, each thing once."""
    compiled: dict[int, Compilation] = {}
    true_run, true_arch, true_programs = JITFunction.run, _triton.arch, _triton.programs
    found: list[Compilation] = []

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **meta: Any) -> None:
        binary = true_run(self, *args, grid=grid, warmup=True, **meta)
        if id(binary) not in compiled:
            compiled[id(binary)] = (self, binary)
            found.append((self, binary))

    driver.set_active(StubDriver(machine))
    JITFunction.run = run
    chosen_for = MACHINES[machine]
    _triton.arch, _triton.programs = (lambda device: chosen_for.tiles), (lambda device: chosen_for.programs)
    try:
        yield found
    finally:
        JITFunction.run, _triton.arch, _triton.programs = true_run, true_arch, true_programs


class Resources(NamedTuple):
    """What a compiled kernel takes, as its assembler and its machine code say."""

    kernel: str
    machine: str
    dtype: str  # of its first pointer
    constants: dict[str, Any]  # by name; the flags and tiles
    warps: int
    stages: int
    registers: int
    spilled: int  # 0 where nothing spills
    shared_bytes: int
    wgmma: bool
    atomics: int


def resources(machine: str, kernel: JITFunction, binary: Any, disassemble: bool) -> Resources:
    named = {kernel.arg_names[path[0]]: value for path, value in binary.src.constants.items()}
    nvidia = MACHINES[machine].target.backend == "cuda"
    registers, spilled = cubin_use(binary.asm["cubin"], disassemble) if nvidia else hsaco_use(binary.asm["amdgcn"])
    text = binary.asm["ptx" if nvidia else "amdgcn"]
    return Resources(
        kernel=kernel.fn.__name__,
        machine=machine,
        dtype=next(re.sub(r"tensordesc<|\*|\[.*", "", kind) for kind in binary.src.signature.values()),
        constants={name: value for name, value in named.items() if name.isupper()},
        warps=binary.metadata.num_warps,
        stages=binary.metadata.num_stages,
        registers=registers,
        spilled=spilled,
        shared_bytes=binary.metadata.shared,
        wgmma="wgmma.mma_async" in text,
        atomics=len(re.findall(r"\b(?:atom|red)\.|(?:global|flat|buffer|ds)_(?:atomic|add_f|pk_add)", text)),
    )


def cubin_use(cubin: bytes, disassemble: bool) -> tuple[int, int]:
    """Registers, and bytes of stack and local memory: what spills has its place there.

    Disassembly, which takes as long as compiling does, also counts the loads and stores of that memory.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = output("cuobjdump", "--dump-resource-usage", file.name)
        code = output("nvdisasm", "-c", file.name) if disassemble else ""
    found = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", usage)
    assert found, usage
    registers, stack, local = map(int, found.groups())
    return registers, stack + local + len(re.findall(r"\b(?:LDL|STL)\b", code))


def hsaco_use(code: str) -> tuple[int, int]:
    """The same from AMD's assembler, which writes them into the metadata."""

    def number(key: str) -> int:
        return int(re.findall(rf"\.{key}:\s*(\d+)", code)[-1])

    spilled = number("vgpr_spill_count") + number("private_segment_fixed_size")
    return number("vgpr_count"), spilled


def output(name: str, *args: str) -> str:
    return subprocess.run([BINARIES / name, *args], capture_output=True, text=True, check=True).stdout
