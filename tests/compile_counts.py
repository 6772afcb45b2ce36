"""Count what the launchers compile while ranks, tokens and widths change, with a stub driver. Prints JSON.

    PYTHONPATH=. python tests/compile_counts.py           TRITON_INTERPRET must not be set

The count is over every cache of every kernel, not over what the stub saw: what was compiled is what is kept there.
Whether a launch compiles is settled before the compiler is asked, so here it goes no further than Triton's own
language; `compile_ahead.py` goes to the machine's code.
"""

import json
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from lora_launches import FP16, IMPLEMENTATIONS, MASKED, PLAIN, Size, group_step, shape, step
from stub_driver import compiling_for
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction

from apt_kernels import activation, kurtosis, lowrank, norms, products, statistics

KERNELS = [
    kernel
    for module in (lowrank, products, statistics, norms, activation, kurtosis)
    for kernel in vars(module).values()
    if isinstance(kernel, JITFunction)
]
FIRST: Size = (8192, 4096, 4096, 8)
LATER: dict[str, list[Size]] = {
    "ranks": [(8192, 4096, 4096, rank) for rank in (16, 24, 40, 48, 64)],
    "tokens": [(tokens, 4096, 4096, 8) for tokens in (8000, 8191, 17, 1)],
    "widths": [(8192, 4088, 4096, 8), (8192, 4096, 2048, 8), (8192, 1000, 1608, 8), (8192, 8, 8, 8)],
    "all at once": [(17, 1000, 1608, 40), (1, 8, 4096, 64)],
}
OPTIONS = {"masked": MASKED, "plain": PLAIN}


def parsed(src: ASTSource, target: GPUTarget, options: dict[str, Any]) -> object:
    """In place of the compiler: its first stage, with the errors that this raises. What it returns is counted."""
    backend, context = make_backend(target), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    chosen = backend.parse_options(dict(options, **src.parse_options()))
    functions, modules = backend.get_codegen_implementation(chosen), backend.get_module_map()
    src.make_ir(target, chosen, functions, modules, context)
    return object()


def total() -> int:
    """Compiled variants of all kernels."""
    return sum(len(cache) for kernel in KERNELS for cache, *_ in kernel.device_caches.values())


def linear(implementation: str, options: dict[str, object]) -> dict[str, int]:
    """New compilations of the first step, and of the later ones by what changes."""
    counts, before = {}, total()
    step(implementation, FIRST, options)
    counts["first"], before = total() - before, total()
    for change, sizes in LATER.items():
        for size in sizes:
            step(implementation, size, options)
        counts[change], before = total() - before, total()
    return counts


def others(T: int, D: int) -> None:
    """A step of the statistics, the norm, the activation and the kurtosis, by their launchers."""
    x_TD, mask, valid_T = shape(T, D, dtype=torch.bfloat16), shape(D), shape(T)
    statistics.gate_pass(x_TD, mask, valid_T, True)
    activation.activation_forward(x_TD, x_TD, mask, valid_T, "silu", True)
    activation.activation_backward(x_TD, x_TD, x_TD, mask, valid_T, "silu", True, (True, True))
    _, mean_T, rstd_T = norms.norm_forward(x_TD, mask, None, mask, 1e-5, True)
    norms.norm_backward(x_TD, x_TD, mask, mask, mean_T, rstd_T, True, (True, True, True))


def kurtosis_step(O: int, I: int, R: int) -> None:
    kurtosis.weight_kurtosis(shape(O, I, dtype=torch.bfloat16), shape(R, I), shape(O, R), 0.5, 8, shape(I))


def first_and_later(launch: Callable[..., None], *sizes: tuple[Any, ...]) -> dict[str, int]:
    before = total()
    launch(*sizes[0])
    first = total() - before
    for size in sizes[1:]:
        launch(*size)
    return {"first": first, "later": total() - before - first}


def main() -> None:
    later = [("split_triton", size) for sizes in LATER.values() for size in sizes]
    tall = [(8192, 4096), (8000, 4096), (8191, 4096), (17, 4096), (1, 4096), (8192, 4088), (8192, 3000)]
    weights = [(4096, 4096, 8), (4096, 4096, 16), (4096, 4096, 40), (4096, 4088, 64), (3000, 1000, 24), (1, 8, 5)]
    with compiling_for("sm_90"), mock.patch("triton.compiler.compile", parsed):
        report = {f"{one}, {name}": linear(one, OPTIONS[name]) for one in IMPLEMENTATIONS for name in OPTIONS}
        again = ("split_cublas", FIRST, MASKED)
        report["another dtype"] = first_and_later(step, again, (*again, FP16))
        report["group"] = first_and_later(group_step, ("split_triton", FIRST), *later)
        report["statistics, norm, activation"] = first_and_later(others, *tall)
        report["kurtosis"] = first_and_later(kurtosis_step, *weights)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
