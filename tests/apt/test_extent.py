"""Calibration passes that nobody asks for more than moments end behind the last projection that reads units."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from own_loop import equal_bits, patched
from tiny_models import NAMES, tiny_batch, tiny_model
from torch import Tensor

import apt
from apt.repair.extent import Extent
from apt.training.controller import calibrated_cut
from apt.training.controller.calibration import model_loss

SETTINGS: dict[str, Any] = {"calibration_batches": 2, "moment_batches": 6, "rounds": 1, "min_heads": 1}


def batches(name: str) -> list[dict[str, Tensor]]:
    return [tiny_batch(name, seed=seed) for seed in range(6)]


class Whole(Extent):
    """One that lets every pass run to its end."""

    @contextmanager
    def one_pass(self) -> Iterator[None]:
        yield


@pytest.mark.parametrize("repair", ["weights", "stream"])
@pytest.mark.parametrize("name", NAMES)
def test_a_repair_is_the_same_as_of_whole_passes(name: str, repair: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = []

    def loss(model: Any, batch: Any) -> Tensor:
        found = model_loss(model, batch)
        ended.append(1)
        return found

    ours = apt.compress(tiny_model(name), batches(name), 0.4, compute_loss=loss, repair=repair, **SETTINGS)
    counts = [len(ended)]
    monkeypatch.setattr(calibrated_cut, "Extent", Whole)
    theirs = apt.compress(tiny_model(name), batches(name), 0.4, compute_loss=loss, repair=repair, **SETTINGS)
    counts.append(len(ended) - counts[0])
    assert equal_bits(ours, theirs)
    assert counts[0] < counts[1]


def test_a_loss_of_two_runs_is_heard_to_its_last() -> None:
    model = patched("bert").eval()
    extent = Extent(model.bert.encoder.layer)
    heard: list[int] = []
    model.bert.encoder.layer[-1].register_forward_hook(lambda *_: heard.append(1))
    for number in range(3):
        with extent.one_pass(), torch.no_grad():
            model(**tiny_batch("bert", seed=number))
            model(**tiny_batch("bert", seed=number))
            heard.append(0)
    assert heard == [1, 1, 0, 1, 1, 1, 1]


def test_an_error_of_the_loss_is_told() -> None:
    model = patched("bert").eval()
    extent = Extent(model.bert.encoder.layer)
    with pytest.raises(RuntimeError, match="mine"), extent.one_pass():
        raise RuntimeError("mine")
    assert not any(layer._forward_hooks for layer in model.bert.encoder.layer)
