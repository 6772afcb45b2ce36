"""Memory is what the system says, and what is free goes back to it at each event."""

import platform

import pytest
import torch
from own_loop import BRIEF, Loop, patched

from apt import memory
from apt.controller import controller, distillation
from apt.memory import give_back, memory_mb

CPU = torch.device("cpu")


def resident() -> float:
    found = memory_mb(CPU)
    assert found is not None
    assert found[1] >= found[0]
    return found[0]


def test_memory_is_that_of_this_process() -> None:
    before = resident()
    block = torch.ones(25_000_000)  # 100 MB
    assert 90.0 < resident() - before < 150.0
    del block


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other libraries give memory back by themselves")
def test_free_memory_is_given_back() -> None:
    blocks = [torch.ones(25_000) for _ in range(2000)]  # 100 kB each, so that glibc puts them on its heap
    full = resident()
    blocks = blocks[-1:]  # the heap cannot shrink below it
    give_back(CPU)
    assert full - resident() > 150.0
    del blocks


def test_it_is_given_back_at_every_event_and_when_the_teacher_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []
    for room in (controller, distillation):
        monkeypatch.setattr(room, "give_back", lambda device: given.append(device.type))
    taught = {"use_self_distillation": True, "target_sparsity": 0.6, "distill_end": 24, "transform_rank": 2, **BRIEF}
    loop = Loop("bert", patched("bert"), 30, **taught)
    counts = []
    for _ in range(30):
        loop.take(1)
        counts.append(len(given))
    steps = [event.step for event in loop.run.events]
    assert [step + 1 for step in range(30) if counts[step] > ([0, *counts])[step]] == sorted([*steps, 24])
    assert set(given) == {"cpu"}


def test_it_is_given_back_every_fifty_steps_on_a_cpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[int, str]] = []
    for step in range(1, 121):
        monkeypatch.setattr(memory, "give_back", lambda device, step=step: given.append((step, device.type)))
        memory.give_back_regularly(CPU, step)
        memory.give_back_regularly(torch.device("cuda"), step)
    assert given == [(50, "cpu"), (100, "cpu")]
    given.clear()
    monkeypatch.setattr(memory, "EVERY", 10)
    monkeypatch.setattr(memory, "give_back", lambda device: given.append((loop.run.step, device.type)))
    loop = Loop("bert", patched("bert"), 30, target_sparsity=0.0, num_events=0)
    loop.take(30)
    assert given == [(10, "cpu"), (20, "cpu"), (30, "cpu")]
