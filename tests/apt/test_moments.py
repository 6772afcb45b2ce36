"""What optimizers keep follows every event: nothing jumps, nothing is lost, and what cannot follow is refused first."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from check import close
from own_loop import BRIEF, Loop, equal_bits, patched
from tiny_models import tiny_batch, tiny_model
from torch import Tensor, nn

import apt
from apt.layers import adapted
from apt.records import RankPlan
from apt.surgery.moments import SCALES
from apt.surgery.ranks import apply_rank_plan

NOTHING = {"target_sparsity": 0.0, "adaptive_rank_update": False, **BRIEF}
NEVER = {"num_events": 0, "target_sparsity": 0.0, "adaptive_rank_update": False}
EVENTS = {"target_sparsity": 0.5, **BRIEF}  # after 6, 12 and 18 steps of 30
make = functools.partial
KINDS: dict[str, Callable[[list[Any]], torch.optim.Optimizer]] = {
    "AdamW": make(torch.optim.AdamW, lr=3e-3, foreach=False),
    "AdamW foreach": make(torch.optim.AdamW, lr=3e-3, foreach=True),
    "AdamW fused": make(torch.optim.AdamW, lr=3e-3, fused=True),
    "Adam": make(torch.optim.Adam, lr=3e-3),
    "AMSGrad": make(torch.optim.Adam, lr=3e-3, amsgrad=True),
    "SGD": make(torch.optim.SGD, lr=1e-2),
    "momentum": make(torch.optim.SGD, lr=1e-2, momentum=0.9, nesterov=True),
    "NAdam": make(torch.optim.NAdam, lr=3e-3),
    "RAdam": make(torch.optim.RAdam, lr=3e-3),
    "Adamax": make(torch.optim.Adamax, lr=3e-3),
    "RMSprop": make(torch.optim.RMSprop, lr=3e-3, momentum=0.9, centered=True),
    "Adagrad": make(torch.optim.Adagrad, lr=1e-2),
    "Adadelta": make(torch.optim.Adadelta, lr=1.0),
}


@pytest.fixture(scope="module", params=["bert", "llama_gqa"])
def at_500(request: pytest.FixtureRequest) -> tuple[str, Any, torch.optim.Optimizer]:
    """A model of one layer after 500 steps, and its optimizer."""
    torch.manual_seed(0)
    model = apt.patch_model(tiny_model(request.param, torch.float32, num_hidden_layers=1), rank=3).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for step in range(500):
        train_a_step(request.param, model, optimizer, step)
    return request.param, model, optimizer


def train_a_step(name: str, model: Any, optimizer: torch.optim.Optimizer, step: int) -> None:
    optimizer.zero_grad()
    model(**tiny_batch(name, size=2, length=6, seed=step)).loss.backward()
    optimizer.step()


def largest_ratio(name: str, model: Any, optimizer: torch.optim.Optimizer, zeros: bool) -> float:
    """Grow every rank from 3 to 8, train 30 steps: the largest update of a new entry over the survivors' largest."""
    adapters = {key: module for key, module in adapted(model) if module.rank}
    apply_rank_plan(model, RankPlan(step=500, budget=0, ranks=dict.fromkeys(adapters, 8)), optimizer)
    sides = [(p, dim) for module in adapters.values() for p, dim in ((module.lora_A, 0), (module.lora_B, 1))]
    for parameter, dim in sides if zeros else ():
        optimizer.state[parameter]["exp_avg_sq"].narrow(dim, 3, 5).zero_()
    ratios = []
    for step in range(500, 530):
        before = [parameter.detach().clone() for parameter, _ in sides]
        train_a_step(name, model, optimizer, step)
        moved = [(p.detach() - old).abs().split([3, 5], dim) for (p, dim), old in zip(sides, before, strict=True)]
        ratios.append(max(new.max().item() for _, new in moved) / max(old.max().item() for old, _ in moved))
    return max(ratios)


@pytest.mark.parametrize("zeros", [False, True], ids=["the mean", "zeros, planted"])
def test_new_ranks_do_not_jump(at_500: tuple[str, Any, torch.optim.Optimizer], zeros: bool) -> None:
    """Decision 5: at most 1.5 times the survivors' updates; zeros for exp_avg_sq would be far beyond that."""
    name, model, optimizer = copy.deepcopy(at_500)
    ratio = largest_ratio(name, model, optimizer, zeros)
    assert ratio > 3.0 if zeros else 0.05 < ratio <= 1.5


@pytest.mark.parametrize("kind", ["AdamW foreach", "AdamW fused", "AMSGrad", "momentum"])
def test_an_event_without_change_leaves_training_bit_for_bit(kind: str) -> None:
    start = patched("bert", torch.float32)
    plain = Loop("bert", copy.deepcopy(start), 0, optimizer=KINDS[kind]).take(14)
    ours = Loop("bert", copy.deepcopy(start), 30, optimizer=KINDS[kind], **NOTHING).take(14)
    assert len(ours.run.events) == 2
    assert equal_bits(ours.model, plain.model)
    assert not equal_bits(ours.model, start)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("AdamW")])
def test_a_run_with_events(kind: str) -> None:
    """Through two events the state has the parameters' shapes and stays finite, and new ranks train."""
    loop = Loop("bert", patched("bert"), 30, optimizer=KINDS[kind], **EVENTS).take(15)
    assert len(loop.run.events) == 2
    grown = [module for _, module in adapted(loop.model) if module.rank > 3]
    assert grown
    assert all(module.lora_B[:, 3:].any() for module in grown)
    for parameter in loop.model.parameters():
        assert torch.isfinite(parameter).all()
        for key, value in loop.optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.dim():
                assert value.shape == parameter.shape, key
                assert torch.isfinite(value).all(), key
                assert key not in SCALES or (value >= 0).all(), key


def test_implementations_of_adamw_agree_through_events() -> None:
    start = patched("llama_gqa")
    loops = []
    for kind in ("AdamW", "AdamW foreach", "AdamW fused"):
        torch.manual_seed(3)  # of the new rows
        loops.append(Loop("llama_gqa", copy.deepcopy(start), 30, optimizer=KINDS[kind], **EVENTS).take(15))
    wanted = loops[0].model.state_dict()
    assert apt.summary(loops[0].model).sparsity > 0.4
    for loop in loops[1:]:
        assert [event.prune for event in loop.run.events] == [event.prune for event in loops[0].run.events]
        for key, value in loop.model.state_dict().items():
            close(key, value, wanted[key])


def test_accelerate_may_wrap_the_optimizer() -> None:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    wrapped = Accelerator(cpu=True).prepare_optimizer
    start, ran = patched("bert"), []
    for wrap in (KINDS["AdamW"], lambda parameters: wrapped(KINDS["AdamW"](parameters))):
        torch.manual_seed(3)
        ran.append(Loop("bert", copy.deepcopy(start), 30, optimizer=wrap, **EVENTS).take(14))
    assert isinstance(ran[1].optimizer, AcceleratedOptimizer)
    assert isinstance(ran[1].run.optimizer, torch.optim.AdamW)
    assert len(ran[1].run.events) == 2
    assert equal_bits(ran[1].model, ran[0].model)


def test_groups_keep_order_and_settings_and_strangers_are_left_alone() -> None:
    """A loss of its own trains a parameter that the model does not hold; events must not touch it."""
    model = patched("bert")
    strangers, trained = nn.Linear(4, 4).double(), [p for p in model.parameters() if p.requires_grad]
    alone = copy.deepcopy(strangers)
    groups = [
        {"params": trained[1::2], "lr": 2e-3, "weight_decay": 0.1},
        {"params": list(strangers.parameters()), "lr": 5e-3},
        {"params": trained[::2], "lr": 1e-3},
    ]
    loop = Loop("bert", model, 30, optimizer=lambda _: torch.optim.AdamW(groups), **EVENTS)
    reference = torch.optim.AdamW(alone.parameters(), lr=5e-3)
    settings = [{**group, "params": None} for group in loop.optimizer.param_groups]
    for step in range(20):
        x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        for layer in (strangers, alone):
            layer(x).square().sum().backward()
        loop.take(1)  # steps the strangers too
        reference.step()
        reference.zero_grad()
    assert len(loop.run.events) == 3
    assert equal_bits(strangers, alone)
    assert [{**group, "params": None} for group in loop.optimizer.param_groups] == settings
    live = [p for p in model.parameters() if p.requires_grad]
    order = {id(p): index for index, p in enumerate([*trained[1::2], *strangers.parameters(), *trained[::2]])}
    listed = [order[id(p)] for group in loop.optimizer.param_groups for p in group["params"]]
    assert listed == sorted(listed)
    assert {id(p) for p in live} < set(order)
    assert len(listed) == len(live) + 2


class Adam8bit(torch.optim.Optimizer):
    """As bitsandbytes and torchao name theirs."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})


def adafactor_of_transformers(parameters: list[Any]) -> Any:
    from transformers.optimization import Adafactor

    return Adafactor(parameters)


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        (torch.optim.Adafactor, "Adafactor keeps one moment a row and one a column"),
        (adafactor_of_transformers, "Adafactor keeps one moment a row and one a column"),
        (Adam8bit, "Adam8bit keeps its moments in quantised blocks"),
        (torch.optim.LBFGS, "LBFGS keeps its state in an unknown form"),
    ],
    ids=["Adafactor", "transformers' Adafactor", "8-bit Adam", "LBFGS"],
)
def test_what_cannot_follow_is_refused_before_the_first_step(optimizer: Any, words: str) -> None:
    model = patched("bert")
    with pytest.raises(ValueError, match=f"{words}, which cannot follow a pruning event; use AdamW, Adam or SGD"):
        Loop("bert", model, 30, optimizer=optimizer, **EVENTS)
    assert not any(module.unit_mask.collecting for _, module in adapted(model) if module.unit_mask is not None)
    assert Loop("bert", model, 30, optimizer=optimizer, **NEVER).run.events == []
