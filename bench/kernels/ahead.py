"""Compile ahead, in threads, what the cases launch: the times that follow then hold no compiler, and the cache is warm.

The launchers are called as the ops call them, on tensors that have shapes and no memory, while launches only compile.
Compilations of one kind are submitted once, and land in Triton's cache on disk, where other processes find them.
"""

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from apt_kernels import _triton, selection
from apt_kernels.operands import LoraNeeds, LoraOperands
from bench.kernels.device import jit_functions
from bench.kernels.linear import MASKS, OP
from bench.kernels.plan import Sizes, sweep_cases
from bench.kernels.session import Session
from bench.kernels.sweep import launch as launch_skinny
from bench.kernels.sweep import operands, taking

Launch = tuple[str, Callable[[], object]]  # what it belongs to, and what compiles when it is called


def launches(sizes: Sizes, dtype: torch.dtype) -> list[Launch]:
    """Everything that the cases of `plan` launch, the most important first, and the tiles of `sweep`."""
    T, rank, encoder = sizes.tokens[0], sizes.ranks[1], sizes.layers["encoder square"]
    found: list[Launch] = []
    for masks in MASKS:
        for implementation in selection.KERNELS[OP][:2]:
            step = partial(_linear, implementation, (T, *sizes.layers["square"], rank), masks, dtype)
            found.append((f"linear {masks}, {implementation}", step))
    for masks in ("plain", "decay"):
        step = partial(_linear, "one_kernel", (sizes.encoder_tokens, *encoder, rank), masks, dtype)
        found.append((f"linear {masks}, one_kernel", step))
    (hidden, _), (_, wide) = sizes.layers["square"], sizes.layers["up"]
    found += [(kind, partial(_pass, kind, T, hidden, wide, dtype)) for kind in PASSES]
    # The linears of encoders have a bias.
    biased = partial(_linear, "split_cublas", (T, *encoder, rank), "bias", dtype)
    found.append(("linear with bias", biased))
    for case in sweep_cases(sizes):
        for tile in (None, *case.tiles):
            found.append((f"{case.name}, {tile}", partial(_tile, case, tile, dtype)))
    return found


def _shape(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*sizes, dtype=dtype, device="meta")


def _linear(implementation: str, size: tuple[int, int, int, int], masks: str, dtype: torch.dtype) -> None:
    """Forward and backward of one layer as the ops call them, and of a group of three where that takes no mask."""
    from apt_kernels import masked_lora, masked_lora_group

    T, I, O, R = size
    x, dy = _shape(T, I, dtype=dtype), _shape(T, O, dtype=dtype)
    layer = LoraOperands(
        weight=_shape(O, I, dtype=dtype),
        a=_shape(R, I),
        b=_shape(O, R),
        bias=_shape(O, dtype=dtype) if masks == "bias" else None,
        gate=_shape(R) if masks == "gate" else None,
        mask_in=_shape(I) if masks in ("binary", "decay", "in") else None,
        mask_out=_shape(O) if masks in ("binary", "decay", "out", "gate") else None,
        scale=0.5,
    )
    _, z = masked_lora.forward(implementation, x, layer)
    needs = LoraNeeds(x=True, a=True, b=True, gate=masks == "gate")
    masked_lora.backward(implementation, dy, x, z, layer, needs)
    if masks == "plain" and implementation in selection.KERNELS["masked_lora_linears"]:
        group = [layer._replace(bias=None)] * 3
        _, z = masked_lora_group.forward(implementation, x, group)
        masked_lora_group.backward([dy] * 3, x, z, group, True)


def _gate(T: int, D: int, wide: int, dtype: torch.dtype, *, masked: bool = True, collect: bool = False) -> None:
    from apt_kernels import statistics

    for width in (D, wide):
        statistics.gate_pass(_shape(T, width, dtype=dtype), _shape(width) if masked else None, None, collect)


def _activation(T: int, D: int, wide: int, dtype: torch.dtype) -> None:
    from apt_kernels import activation

    g = _shape(T, wide, dtype=dtype)
    for mask in (_shape(wide), None):
        activation.activation_forward(g, g, mask, None, "silu", False)
        activation.activation_backward(g, g, g, mask, None, "silu", False, (True, True))


def _norm(T: int, D: int, wide: int, dtype: torch.dtype) -> None:
    from apt_kernels import norms

    x, mask = _shape(T, D, dtype=dtype), _shape(D)
    _, mean, rstd = norms.norm_forward(x, mask, None, mask, 1e-6, False)
    norms.norm_backward(x, x, mask, mask, mean, rstd, False, (True, False, False))


def _kurtosis(T: int, D: int, wide: int, dtype: torch.dtype) -> None:
    from apt_kernels import kurtosis

    for width in (D, wide):
        a, b = _shape(16, width, dtype=dtype), _shape(D, 16, dtype=dtype)
        kurtosis.weight_kurtosis(_shape(D, width, dtype=dtype), a, b, 0.7, 1, None)


PASSES: dict[str, Callable[..., None]] = {
    "gate": _gate,
    "gate collecting": partial(_gate, collect=True),
    "column sums": partial(_gate, masked=False, collect=True),
    "gated activation": _activation,
    "masked norm": _norm,
    "weight kurtosis": _kurtosis,
}


def _pass(kind: str, T: int, hidden: int, wide: int, dtype: torch.dtype) -> None:
    PASSES[kind](T, hidden, wide, dtype)


def _tile(case: Any, tile: Any, dtype: torch.dtype) -> None:
    with taking(tile):
        launch_skinny(case, operands(case, lambda shape, over: _shape(*shape, dtype=dtype)))


@contextmanager
def compiling_only(device: torch.device) -> Iterator[list[str]]:
    """Launches compile and run nothing; tensors without memory count as this device's. Yields the kernels' names."""
    from triton.runtime.jit import JITFunction

    true_run, arch, programs = JITFunction.run, _triton.arch(device), _triton.programs(device)
    launched: list[str] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **meta: Any) -> Any:
        launched.append(self.fn.__name__)
        return true_run(self, *args, grid=grid, warmup=True, **meta)

    with (
        patch.object(JITFunction, "run", run),
        patch.object(_triton, "arch", lambda _: arch),
        patch.object(_triton, "programs", lambda _: programs),
    ):
        yield launched


def compile_ahead(sizes: Sizes, session: Session) -> None:
    """Compile everything twice, in threads, then from the cache that this filled; a row each, and each failure."""
    if session.device.type != "cuda":
        row = {"case": "compile ahead", "implementation": "all kernels", "status": "unavailable"}
        session.write([row | {"note": "kernels compile for a GPU alone"}])
        return
    for what in ("cold", "warm"):
        started = time.perf_counter()
        failed = compile_all(launches(sizes, session.dtype), session.device)
        row = {"case": "compile ahead", "op": "compile", "implementation": "all kernels", "what": what}
        seconds = round(time.perf_counter() - started, 2)
        session.write([row | {"value": seconds, "unit": "s", "note": f"{os.cpu_count()} cores"}])
        for name, error in failed.items() if what == "cold" else ():
            session.failed(f"compile ahead {name}", "", error)


def compile_all(todo: list[Launch], device: torch.device) -> dict[str, Exception]:
    """Compile on all cores; what failed, by its name. No failure keeps the others."""
    import triton

    failed: dict[str, Exception] = {}
    with compiling_only(device), NotingPool(max(1, (os.cpu_count() or 2) - 1)) as pool:
        forget_compiled()
        with triton.AsyncCompileMode(pool, ignore_errors=True):
            for name, launch in todo:
                pool.owner = name
                try:
                    launch()
                except Exception as error:
                    failed[name] = error
        for name, future in pool.futures:
            if error := future.exception():
                failed[name] = Exception(f"{type(error).__name__}: {error}")
    return failed


class NotingPool(ThreadPoolExecutor):
    """Threads that remember for whom each compilation was submitted, since Triton forgets those that fail."""

    def __init__(self, workers: int) -> None:
        super().__init__(workers)
        self.owner = ""
        self.futures: list[tuple[str, Future[Any]]] = []

    def submit(self, fn: Any, /, *args: Any, **named: Any) -> Future[Any]:
        future = super().submit(fn, *args, **named)
        self.futures.append((self.owner, future))
        return future


def forget_compiled() -> None:
    """Empty the caches of this process, so that what is compiled is looked up on disk."""
    from apt_kernels import passes

    passes._compiled.clear()
    for kernel in jit_functions():
        kernel.device_caches.clear()
