"""AdaLoRA's simple form beside its formula, which ranks each allocation keeps, and several updates of one linear."""

from typing import Any

import pytest
import torch
from check import close
from tiny_models import tiny_batch, tiny_model
from torch import Tensor, nn

import apt
import apt_kernels
from apt.layers import APTAdapter, adapted
from apt.methods import Joined, MethodConfig, RankImportance, adapt, join

IMPORTANCE = [0.5, 0.05, 0.9, -2.0, 0.3]  # three above the threshold of 0.1


def filled(rank: int = 5, seed: int = 0, method: str = "adalora_simple", **settings: Any) -> Any:
    """An adapted linear with random A and B, and the importance above."""
    torch.manual_seed(seed)
    layer: Any = adapt(nn.Linear(7, 6).double(), method, rank, 1.7, MethodConfig(**settings))
    with torch.no_grad():
        for parameter in layer.adapter_parameters():
            parameter.normal_()
        if method == "adalora_simple":
            layer.delta.rank_importance.copy_(torch.tensor(IMPORTANCE[:rank]))
    return layer


def by_hand(layer: Any, used: list[int], x: Tensor) -> Tensor:
    y = x @ layer.weight.T + layer.bias
    for i in used:
        delta = layer.delta
        y = y + 1.7 * delta.rank_importance[i] * (x @ delta.lora_A[i])[:, None] * delta.lora_B[:, i]
    return y


def largest(layer: Any) -> list[int]:
    delta = layer.delta
    size = [abs(IMPORTANCE[i]) * (delta.lora_A[i].norm() * delta.lora_B[:, i].norm()).item() for i in range(5)]
    return sorted(range(5), key=lambda i: -size[i])[:3]


@pytest.mark.parametrize("allocation", ["uniform", "importance", "magnitude"])
def test_the_ranks_in_use(allocation: str) -> None:
    layer, x = filled(rank_allocation=allocation), torch.randn(4, 7, dtype=torch.float64)
    used = {"uniform": [0, 1, 2], "importance": [0, 2, 4], "magnitude": largest(layer)}[allocation]
    assert layer.delta.get_effective_rank() == 3
    apt_kernels.reset_calls()
    close("forward", layer(x), by_hand(layer, used, x))
    assert apt_kernels.calls()["masked_lora_linear"] == {"torch": 1}


def test_one_rank_is_always_used() -> None:
    layer = filled(rank_allocation="importance")
    with torch.no_grad():
        layer.delta.rank_importance.copy_(torch.tensor([-1.0, 0.02, 0.01, 0.0, -0.3]))
    assert layer.delta.get_effective_rank() == 1
    assert layer.delta.used().tolist() == [False, True, False, False, False]


def test_a_rank_out_of_use_may_come_back() -> None:
    layer, x = filled(rank_allocation="importance"), torch.randn(4, 7, dtype=torch.float64)
    upstream = torch.randn(4, 6, dtype=torch.float64)
    (layer(x) * upstream).sum().backward()
    delta = layer.delta
    wanted = 1.7 * ((x @ delta.lora_A.T) * (upstream @ delta.lora_B)).sum(0)
    close("importance", delta.rank_importance.grad, wanted.detach())  # of the ranks out of use too
    assert not delta.lora_A.grad[[1, 3]].any()
    assert not delta.lora_B.grad[:, [1, 3]].any()
    assert delta.lora_A.grad[[0, 2, 4]].any(1).all()


def test_without_adaptive_rank_it_is_lora() -> None:
    layer, x = filled(adaptive_rank=False), torch.randn(4, 7, dtype=torch.float64)
    with torch.no_grad():
        layer.delta.rank_importance.fill_(1.0)
    assert layer.delta.get_effective_rank() == 5
    assert not layer.delta.rank_importance.requires_grad
    close("forward", layer(x), by_hand(layer, [0, 1, 2, 3, 4], x))


@pytest.mark.parametrize("allocation", ["uniform", "importance", "magnitude"])
def test_the_budget_of_adalora_is_spent_as_asked(allocation: str) -> None:
    """Of six adapters with four ranks each, whose lambdas differ in size, half of all ranks are left."""
    settings = {"rank_allocation": allocation, "target_r": 2, "target_modules": ("q", "v")}
    model = apt.patch_model(tiny_model("bert"), method="adalora", init_r=4, **settings).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    run = apt.Controller(model, optimizer, 4)
    deltas: dict[str, Any] = {name: m.delta for name, m in adapted(model)}
    draw = torch.Generator().manual_seed(3)
    sizes = {name: torch.rand(4, generator=draw, dtype=torch.float64) + 0.1 for name in deltas}
    with torch.no_grad():
        for name, delta in deltas.items():
            delta.lora_E.copy_(sizes[name])
    for step in range(4):
        batch = tiny_batch("bert", seed=step)
        run.loss(model(**batch), batch).backward()
        run.after_backward()
        optimizer.step()
        run.after_step()
        optimizer.zero_grad()
    left: dict[str, Any] = {name: m.delta for name, m in adapted(model) if m.rank}
    ranks = [delta.rank for delta in left.values()]
    assert sum(ranks) == 2 * len(deltas)
    everything = torch.cat(list(sizes.values())).sort(descending=True).values[: 2 * len(deltas)]
    found = torch.cat([delta.lora_E.detach() for delta in left.values()]).sort(descending=True).values
    assert (set(ranks) == {2}) == (allocation == "uniform")
    assert torch.equal(found, everything) == (allocation == "magnitude")


def test_updates_of_one_linear_add_up() -> None:
    first, second = filled(rank=2, method="lora"), filled(seed=1)
    third: Any = filled(rank=3, seed=2, method="lora")
    x, weight = torch.randn(4, 7, dtype=torch.float64), first.weight
    parts = [layer.merged_weight() - layer.weight for layer in (first, second, third)]
    kept = [*first.adapter_parameters(), *second.adapter_parameters(), *third.adapter_parameters()]
    join(first, second)
    join(first, third)
    assert isinstance(first.delta, Joined)
    assert [id(p) for p in first.adapter_parameters()] == [id(p) for p in kept]
    assert first.rank == 2 + 5 + 3
    close("forward", first(x), x @ (weight + sum(parts)).T + first.bias)
    close("merged", first.merged_weight(), (weight + sum(parts)).detach())
    assert apt_kernels.calls()["masked_lora_linear"]


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(ValueError, match=r"share their dropout; it has 0\.0, not 0\.5"):
        join(filled(), filled(lora_dropout=0.5))
    with pytest.raises(ValueError, match="GatedSpectral and another adapter do not go together"):
        join(filled(method="gsa", svd_cache=None), filled())
    with pytest.raises(ValueError, match="rank_allocation must be one of"):
        MethodConfig(rank_allocation="best")


def test_ranks_are_found_in_a_patched_model() -> None:
    model = apt.patch_model(tiny_model("bert"), method="adalora_simple", r=4, importance_threshold=0.5)
    modules = [module for _, module in adapted(model) if isinstance(module, APTAdapter) and module.rank]
    deltas = [m.delta for m in modules if isinstance(m.delta, RankImportance)]
    assert len(deltas) == len(modules) > 0
    with torch.no_grad():
        deltas[0].rank_importance[:3] = 0.4
    counts = apt.summary(model)
    assert list(counts.active.values()) == [1, *[4] * (len(deltas) - 1)]
