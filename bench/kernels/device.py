"""What decides between the implementations: the GEMM's speed in both layouts, the cost of beta = 1, the bandwidth.

And what the device says of the kernels that ran on it.
"""

from functools import partial
from typing import Any

import torch

from apt_kernels import _triton
from bench.kernels.session import Session, normal
from bench.timing import Call

SPILLS = "kernels that ran"


def measure_gemm(tokens: int, d_in: int, d_out: int, session: Session) -> None:
    """``x W^T`` (NT, forward) and ``dy W`` (NN, backward) in TFLOP/s, and what adding onto a tensor costs in each."""
    draw = partial(normal, session=session, generator=session.generator(0))
    element = torch.finfo(session.dtype).bits // 8
    copies = session.num_copies((tokens * (d_in + d_out) + d_in * d_out) * element)
    calls: dict[str, list[Call]] = {}
    for _ in range(copies):
        x, dy, weight = draw((tokens, d_in)), draw((tokens, d_out)), draw((d_out, d_in), over=d_in)
        y, dx = torch.empty_like(dy), torch.empty_like(x)
        products = {"NT": (y, x, weight.T), "NN": (dx, dy, weight)}
        for layout, (out, left, right) in products.items():
            out.normal_()
            calls.setdefault(f"{layout} product", []).append(partial(torch.mm, left, right, out=out))
            for beta in (0, 1):
                # Scaled down, so that the sum stays finite however often it is added to.
                add = partial(torch.addmm, out, left, right, beta=beta, alpha=1e-4, out=out)
                calls.setdefault(f"{layout} addmm beta={beta}", []).append(add)
    times = session.clock.interleaved(calls)
    rows: list[dict[str, Any]] = []
    for name, taken in times.items():
        row = {"case": f"gemm {d_in}x{d_out} T={tokens}", "op": "gemm", "implementation": name, "what": "forward"}
        row |= {"tokens": tokens, "d_in": d_in, "d_out": d_out, **taken.columns()}
        row["ratio"] = round(taken.median / times[f"{name[:2]} product"].median, 4)
        row |= {"value": round(2 * tokens * d_in * d_out / taken.median / 1e9, 1), "unit": "TFLOP/s"}
        rows.append(row)
    session.write(rows)


def measure_copy(elements: int, session: Session) -> None:
    """The bandwidth of a plain copy: one read and one write."""
    pairs = [(normal((elements,), session, session.generator(n)), None) for n in range(2)]
    calls: list[Call] = [partial(torch.empty_like(source).copy_, source) for source, _ in pairs]
    taken = session.clock.interleaved({"copy": calls})["copy"]
    moved = 2 * pairs[0][0].numel() * pairs[0][0].element_size()
    row = {"case": "copy", "op": "copy", "implementation": "torch", "what": "forward", **taken.columns()}
    session.write([row | {"value": round(moved / taken.median / 1e6, 1), "unit": "GB/s"}])


def measure_spills(session: Session) -> None:
    """The most registers that any kernel of ours spilled, of those that were loaded here (G20)."""
    loaded = [compiled for compiled in compiled_kernels() if getattr(compiled, "n_spills", None) is not None]
    row: dict[str, Any] = {"case": SPILLS, "op": "resources", "implementation": "all kernels", "what": "spilled"}
    if not loaded:
        session.write([row | {"status": "unavailable", "note": "no kernel was loaded on a GPU"}])
        return
    worst = max(loaded, key=lambda compiled: compiled.n_spills)
    note = f"{len(loaded)} kernels, the worst is {worst.metadata.name}"
    session.write([row | {"value": worst.n_spills, "unit": "registers", "note": note}])


def compiled_kernels() -> list[Any]:
    """What Triton holds compiled in this process, of every kernel of ours; nothing in the interpreter."""
    return [compiled for kernel in jit_functions() for cache, *_ in kernel.device_caches.values()
            for compiled in cache.values()]  # fmt: skip


def jit_functions() -> list[Any]:
    """Every kernel of ours, none where Triton is missing or interprets."""
    if not _triton.INSTALLED or _triton.interpreted():
        return []
    from apt_kernels import activation, kurtosis, lowrank, norms, products, statistics

    modules = (lowrank, products, statistics, norms, activation, kurtosis)
    return [kernel for module in modules for kernel in vars(module).values() if hasattr(kernel, "device_caches")]
