"""Contestants by name, also with every op of ours forced onto one backend: what a step on a GPU compares."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from apt_kernels import _triton
from bench.contestants import CONTESTANTS, Contestant, frozen

BY = " by "  # what stands behind it is a backend that every op is forced onto
GPU_CONTESTANTS = (  # the most important first; what compiles for long, last
    "peft lora",
    "frozen",
    "apt lora by triton",
    "apt lora by torch",
    "peft lora, base dtype",
    "apt 0% by triton",
    "apt 60% by triton",
    "apt 30% by triton",
    "apt 60% by torch",
    "peft lora, compiled",
)


def find(name: str) -> Callable[..., Contestant]:
    """The contestant of a name: of the table, "frozen", or either "by" a backend, as in ``apt 60% by triton``.

    Raises:
        ValueError: there is none of that name.
    """
    base, _, backend = name.partition(BY)
    known: dict[str, Callable[..., Contestant]] = {"frozen": frozen, **CONTESTANTS}
    if base not in known:
        raise ValueError(f"bench: there is no contestant {base!r}; choose one of {list(known)}")
    return by(backend, known[base]) if backend else known[base]


def by(backend: str, build: Callable[..., Contestant]) -> Callable[..., Contestant]:
    """The same contestant with every op forced onto one backend."""

    def forced(model: nn.Module, batch: Mapping[str, Tensor], targets: tuple[str, ...]) -> Contestant:
        with forcing(backend):
            made = build(model, batch, targets)
        step = made.step

        def stepped() -> None:
            with forcing(backend):
                step()

        return replace(made, step=stepped, backend=backend)

    return forced


@contextmanager
def forcing(backend: str) -> Iterator[None]:
    """APT_BACKEND inside; nothing where the backend is empty."""
    before = os.environ.get("APT_BACKEND")
    if backend:
        os.environ["APT_BACKEND"] = backend
    try:
        yield
    finally:
        if backend:
            os.environ.pop("APT_BACKEND")
        if before is not None:
            os.environ["APT_BACKEND"] = before


def why_not(name: str, device: str, dtype: torch.dtype) -> str | None:
    """Why a contestant cannot run here, in words; None where it can."""
    backend = name.partition(BY)[2]
    return _triton.why_unusable(torch.empty(0, device=device, dtype=dtype)) if backend not in ("", "torch") else None
