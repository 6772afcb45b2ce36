"""What every test runs under: no network, the interpreter where there is no GPU, a fixed seed, NaN in fresh memory."""

import gc
import os
import random
from collections.abc import Callable, Iterator

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported

import numpy as np
import pytest
import torch
from pairs import with_few
from torch import Tensor

from apt_kernels import _triton

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
    torch.set_num_threads(1)  # at toy shapes threads only wait for each other

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


# Files that take a minute or so. Workers, which take file by file, begin with them, so that none ends with one alone.
LONGEST = [
    *("apt/test_estimate", "kernels/test_compile_ahead", "apt/test_compile", "apt/test_experiment"),
    *("system/test_distilled_run", "bench/test_accuracy", "bench/test_last_phase", "system/test_second_start"),
    *("system/test_trainer", "system/test_text_run", "system/test_kill_and_resume", "apt/test_report_page"),
    *("system/test_stopped", "system/test_trainer_losses", "system/test_task_runs", "system/test_cli"),
    *("system/test_disk", "bench/test_first_gpu", "apt/test_shared_input", "bench/test_decoder"),
]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--pairs", action="store_true", help="of tests marked `pairs` run the few cases that a GPU gets")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The longest files first; on a GPU few cases: one may cost a compilation or more, in the interpreter none."""
    if few_cases(config):
        items[:] = with_few(items)
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(f"{item.path.parent.name}/{item.path.stem}", len(places)))


def few_cases(config: pytest.Config) -> bool:
    return DEVICE == "cuda" or config.getoption("--pairs")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and DEVICE != "cuda":
        pytest.skip("needs a GPU")


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture(autouse=True, scope="module")
def modules_are_no_garbage() -> None:
    """A Trainer collects garbage as it begins: then nobody looks through all that was imported, which takes longest."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # or libraries complain at the end of what they find alive


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
def no_tile_compiles_unasked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel's first launch compiles all its tiles, for numbers of tokens to come: on a GPU most of the time here."""
    if few_cases(request.config) and _triton.INSTALLED:
        monkeypatch.setattr("apt_kernels.passes.compile_only", lambda *args, **kwargs: None)


@pytest.fixture(autouse=True)
def process_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A command sets the threads of its process, and whether it asks the hub; here that is the process of all tests."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
