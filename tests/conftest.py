"""What every test runs under: no network, the interpreter where there is no GPU, a fixed seed, NaN in fresh memory."""

import os
import random
from collections.abc import Callable, Iterator

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported

import numpy as np
import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
    torch.set_num_threads(1)  # at toy shapes threads only wait for each other

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An allocation whose floating-point memory holds NaN, so that whoever forgets to write it is seen."""

    def wrapped(*args: object, **kwargs: object) -> Tensor:
        fresh = allocate(*args, **kwargs)
        return fresh.detach().fill_(float("nan")).requires_grad_(fresh.requires_grad) if holds_noise(fresh) else fresh

    return wrapped


def holds_noise(fresh: Tensor) -> bool:
    return fresh.is_floating_point() and fresh.device.type != "meta" and fresh.numel() > 0


@pytest.fixture(autouse=True)
def nan_in_fresh_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):  # torch lists what obeys such a block when first in one: it must list the originals
        torch.empty(1)
    fresh = [(torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")]
    for owner, name in fresh:
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture(autouse=True)
def process_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A command sets the threads of its process, and whether it asks the hub; here that is the process of all tests."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
