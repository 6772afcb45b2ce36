"""Linears that read the same tensor are computed together, and nobody can tell but by the counters."""

import copy
from typing import Any

import pytest
import torch
from check import close
from tiny_models import tiny_batch, tiny_model
from torch import Tensor, nn

import apt
import apt_kernels
from apt.layers import APTAdapter, SharedInput, adapted, share_input


def trained_start(model: nn.Module) -> None:
    """B is zero at the start, which would hide an adapter that is left out."""
    for _, adapter in adapted(model):
        if adapter.lora_B is not None:
            nn.init.normal_(adapter.lora_B, std=0.2)


def loss_and_gradients(model: nn.Module, name: str) -> dict[str, Tensor]:
    model.zero_grad()
    out = model(**tiny_batch(name))
    out.loss.backward()
    grads = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    return {"logits": out.logits.detach(), **grads}


@pytest.mark.parametrize("method", ["apt", "lora"])
@pytest.mark.parametrize("name", ["bert", "llama_gqa", "qwen2"])
def test_equals_one_by_one(name: str, method: str) -> None:
    targets = ["q", "k", "v", "up"] if name == "bert" else ["q", "v", "gate", "up"]
    together = apt.patch_model(tiny_model(name), method=method, target_modules=targets)
    trained_start(together)
    alone = copy.deepcopy(together)
    for _, adapter in adapted(alone):
        adapter.shared = None
    apt_kernels.reset_calls()
    got = loss_and_gradients(together, name)
    assert "masked_lora_linears" in apt_kernels.calls()
    apt_kernels.reset_calls()
    wanted = loss_and_gradients(alone, name)
    assert "masked_lora_linears" not in apt_kernels.calls()
    assert got.keys() == wanted.keys()
    for key in wanted:
        close(key, got[key], wanted[key])


def make_pair(ranks: tuple[int, int] = (2, 2)) -> tuple[list[APTAdapter], SharedInput]:
    members = [APTAdapter(nn.Linear(4, 3).double(), rank) for rank in ranks]
    for member in members:
        if member.lora_B is not None:
            nn.init.normal_(member.lora_B)
    return members, share_input(members)


def plain(member: APTAdapter, x: Tensor) -> Tensor:
    return nn.functional.linear(x, member.merged_weight(), member.bias)


def runs() -> int:
    return sum(apt_kernels.calls().get("masked_lora_linears", {}).values())


def test_each_output_is_made_once_and_kept_no_longer() -> None:
    (first, second), shared = make_pair()
    apt_kernels.reset_calls()
    for order in ((first, second), (second, first)):
        x = torch.randn(5, 4, dtype=torch.float64)
        for member in order:
            close("y", member(x), plain(member, x))
        assert shared._pending.x is None
        assert shared._pending.outputs is None
    assert runs() == 2


def test_another_input_or_grad_mode_or_a_second_call_is_computed_anew() -> None:
    (first, second), _ = make_pair()
    x, other = torch.randn(2, 5, 4, dtype=torch.float64)
    first(x)
    close("another input", second(other), plain(second, other))
    with torch.no_grad():
        first(x)
    y = second(x)
    assert y.requires_grad
    close("with gradients", y, plain(second, x))
    first(x)
    with torch.no_grad():
        second.weight.mul_(2.0)
    first(x)  # called again: all are computed again, with the weights of now
    close("called again", second(x), plain(second, x))


def test_without_any_adapter_nothing_is_shared() -> None:
    (first, second), _ = make_pair((0, 0))
    x = torch.randn(5, 4, dtype=torch.float64)
    apt_kernels.reset_calls()
    for member in (first, second):
        close("y", member(x), plain(member, x))
    assert runs() == 0


def test_a_copy_in_the_middle_of_a_pass_shares_among_its_own() -> None:
    (first, second), _ = make_pair()
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    first(x * 1.0)
    twin: Any = copy.deepcopy(nn.ModuleList([first, second]))
    assert twin[0].shared is twin[1].shared is not first.shared
    with torch.no_grad():
        twin[1].weight.mul_(2.0)
    close("copy", twin[1](x), plain(twin[1], x))
    close("original", second(x), plain(second, x))


@pytest.mark.parametrize("name", ["bert", "llama_gqa"])
def test_compiled_in_one_graph(name: str) -> None:
    model = tiny_model(name, num_hidden_layers=1)  # each layer is traced anew
    apt.patch_model(model, method="lora", target_modules=["q", "v", "up"])
    trained_start(model)
    batch = tiny_batch(name)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    close("loss", compiled(**batch).loss.detach(), model(**batch).loss.detach())
    explained = torch._dynamo.explain(lambda: model(**batch).loss)()
    ours = [str(reason) for reason in explained.break_reasons if "apt" in str(reason)]
    assert not ours, ours
