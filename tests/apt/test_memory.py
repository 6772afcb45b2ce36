"""Memory is what the system says, what is free goes back to it at each event, and little is kept."""

import os
import platform
import subprocess
import sys

import pytest
import torch
from own_loop import BRIEF, Loop, patched
from torch import nn

import apt
from apt.surgery import patch
from apt.surgery.put_in import CAPACITY, keep_few_kernels
from apt.training import memory
from apt.training.controller import controller, distillation
from apt.training.memory import give_back, memory_mb

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


COMPILED = """
import torch
from transformers import BertConfig, BertModel
import apt

model = BertModel(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64))
apt.patch_model(model, method="lora")
for length in [*range(2, 2 + {lengths}), 2]:
    torch.nn.functional.gelu(torch.ones(length, 8))
"""


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
@pytest.mark.parametrize(("lengths", "compiled"), [(60, 60), (70, 71)])  # of 60 the first is still there, of 70 not
def test_a_patched_model_leaves_onednn_64_kernels(lengths: int, compiled: int) -> None:
    told = {name: value for name, value in os.environ.items() if name not in CAPACITY} | {"ONEDNN_VERBOSE": "2"}
    script = COMPILED.format(lengths=lengths)
    ran = subprocess.run([sys.executable, "-c", script], env=told, capture_output=True, text=True, check=True)
    assert ran.stdout.count("create:cache_miss,cpu,eltwise") == compiled


def test_that_is_for_float32_on_a_cpu_where_the_user_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def said(model: nn.Module, **given: str) -> dict[str, str]:
        monkeypatch.setattr(memory.os, "environ", given)
        keep_few_kernels(model)
        return given

    plain = nn.Linear(2, 2)
    assert said(plain) == {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}
    for other in (nn.Linear(2, 2, dtype=torch.bfloat16), nn.Linear(2, 2, device="meta"), nn.GELU()):
        assert said(other) == {}
    for name in CAPACITY:
        assert said(plain, **{name: "1024"}) == {name: "1024"}


def test_patching_asks_for_that_once_and_unpatching_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[nn.Module] = []
    monkeypatch.setattr(patch, "keep_few_kernels", asked.append)
    model = patched("bert")
    assert asked == [model]
    apt.unpatch_model(model)
    assert asked == [model]
