"""What decides between the implementations: the GEMM's speed in both layouts, the cost of beta = 1, the bandwidth."""

from functools import partial
from typing import Any

import torch

from bench.kernels.session import Session, normal
from bench.timing import Call


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
