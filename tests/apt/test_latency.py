"""Measuring what heads and neurons cost in time, with a clock that counts operations, so that times are exact."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from own_loop import equal_bits, patched
from tiny_models import free_heads, random_plan, tiny_model
from torch.utils.flop_counter import FlopCounterMode

import apt
import apt.training.measure_latency
from apt.families import anatomy_of
from apt.layers import adapted
from apt.pruning.units import unit_masks
from apt.surgery.prune import apply_prune_plan
from apt.training.measure_latency import measure_latency, sample_batch

EQUAL_LAYERS = ["bert", "llama_gqa", "opt", "deberta", "gpt2", "t5"]


def eager(name: str) -> Any:
    """A patched model whose attention is written out, so that its operations are counted."""
    return apt.patch_model(tiny_model(name, attn_implementation="eager"), rank=3).train()


def flops(run: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


@pytest.fixture
def exact_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A millisecond is an operation."""

    def counted(
        runs: Mapping[str, Callable[[], object]], repeats: int, device: torch.device, **_: str
    ) -> dict[str, float]:
        return {name: flops(run) for name, run in runs.items()}

    monkeypatch.setattr(apt.training.measure_latency, "medians_ms", counted)


def counts_of(model: Any) -> dict[str, int]:
    gates = unit_masks(anatomy_of(model))
    return {name: 0 if gate is None else gate.num_units for name, gate in gates.items()}


def without_adapters(model: Any) -> Any:
    model = copy.deepcopy(model)
    for _, module in adapted(model):
        module.drop_adapter()
    return model.eval()


@pytest.mark.usefixtures("exact_clock")
@pytest.mark.parametrize("name", EQUAL_LAYERS)
def test_the_table_tells_the_time_of_a_pruned_model(name: str) -> None:
    """Of one whose adapters are merged; operations grow in straight lines, so every width is exact."""
    model = eager(name)
    table = measure_latency(anatomy_of(model), batch_size=3, length=7)
    batch = sample_batch(model, 3, 7)
    assert table.total_ms(counts_of(model)) == flops(lambda: without_adapters(model)(**batch))
    for seed, empty in ((1, ()), (2, free_heads(model)[:1]), (3, ["layers.2.heads", "layers.0.neurons"])):
        small = copy.deepcopy(model)
        apply_prune_plan(small, random_plan(small, seed=seed, empty=empty))
        plain = without_adapters(small)
        assert table.total_ms(counts_of(small)) == pytest.approx(flops(lambda p=plain: p(**batch)))


@pytest.mark.parametrize("name", [*EQUAL_LAYERS, "qwen2_mixed", "gemma3"])
def test_measuring_leaves_the_model_as_it_was(name: str) -> None:
    model = patched(name)
    before, modules = copy.deepcopy(model), list(model.modules())
    modes, random_state = [module.training for module in modules], torch.get_rng_state()
    hooks = [len(module._forward_pre_hooks) for module in modules]
    table = measure_latency(anatomy_of(model), batch_size=2, length=6, repeats=1)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(ours is theirs for ours, theirs in zip(model.modules(), modules, strict=True))
    assert [module.training for module in modules] == modes
    assert equal_bits(model, before)
    assert [len(module._forward_pre_hooks) for module in modules] == hooks
    parts = {}
    for unit_group, count in counts_of(model).items():
        stack, _, kind = unit_group.split(".")
        parts[f"{stack}.{kind}"] = count
    assert {part: points[-1][0] for part, points in table.parts.items()} == parts
    assert all(points[0] == [0, 0.0] for points in table.parts.values())
    assert all(ms >= 0.0 for points in table.parts.values() for _, ms in points)
    assert table.rest_ms >= 0.0
    assert (table.batch_size, table.length, table.device) == (2, 6, "cpu")


def test_a_real_clock_sees_that_more_takes_longer() -> None:
    """Wide enough that it cannot be noise: a quarter of the neurons against all of them."""
    wide = apt.patch_model(tiny_model("bert", torch.float32, intermediate_size=8192))
    table = measure_latency(anatomy_of(wide), batch_size=16, length=32)
    points = dict(map(tuple, table.parts["layers.neurons"]))
    assert points[8192] > 2.0 * points[2048] > 0.0
