"""A compiled run: one graph an interval between events, and the numbers of the eager one."""

import copy
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from check import close
from own_loop import Loop
from tiny_models import tiny_batch, tiny_model
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.testing import CompileCounterWithBackend

import apt
from apt.layers import adapted

THRICE = {"target_sparsity": 0.6, "num_events": 3, "prune_start": 0, "prune_end": 24, "round_to": 1}  # every 8 steps
ONCE = {**THRICE, "num_events": 1, "prune_end": 8}
LIMIT = 2  # recompilations, in place of torch's 8, which takes more events
STEPS = 26


@pytest.fixture(autouse=True)
def no_graph_outlives_its_test() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=LIMIT):
        yield
    torch._dynamo.reset()


def plain(name: str) -> Any:
    """The type of problem is named, which a classifier otherwise does in its first forward pass."""
    problem = {"problem_type": "single_label_classification"} if name == "bert" else {}
    return tiny_model(name, num_hidden_layers=1 if name == "bert" else 2, **problem)


def start(name: str) -> Any:
    return apt.patch_model(plain(name), rank=3).train()


def trained(name: str, model: Any, run_with: Any, **settings: Any) -> Loop:
    """A run of `STEPS`, whose forward passes are those of `run_with`; new rows are drawn alike in every run."""
    torch.manual_seed(3)
    loop = Loop(name, model, STEPS, **settings)
    loop.model = run_with
    return loop.take(STEPS)


def same_run(ours: Loop, theirs: Loop) -> None:
    def decided(loop: Loop) -> list[Any]:
        return [(event.step, event.prune, event.rank) for event in loop.run.events]

    assert decided(ours) == decided(theirs)
    wanted = theirs.run.model.state_dict()
    assert ours.run.model.state_dict().keys() == wanted.keys()
    for key, value in ours.run.model.state_dict().items():
        close(key, value, wanted[key])


def test_a_graph_lasts_from_event_to_event() -> None:
    """Three events, past the limit of recompilations: a graph before each and one after all, equal to eager."""
    model, counter = start("bert"), CompileCounterWithBackend("eager")
    eager = copy.deepcopy(model)
    compiled = trained("bert", model, torch.compile(model, backend=counter), **THRICE)
    assert len(compiled.run.events) == 3 > torch._dynamo.config.recompile_limit == LIMIT
    assert counter.frame_count == 3 + 1
    same_run(compiled, trained("bert", eager, eager, **THRICE))
    assert apt.summary(compiled.model).sparsity >= 0.6


def test_backward_and_statistics_in_the_graph() -> None:
    """With autograd traced too: what the gates add in backward is part of the compiled graph."""
    model, counter = start("llama_gqa"), CompileCounterWithBackend("aot_eager")
    eager = copy.deepcopy(model)
    same_run(
        trained("llama_gqa", model, torch.compile(model, backend=counter), **ONCE),
        trained("llama_gqa", eager, eager, **ONCE),
    )
    assert counter.frame_count == 1 + 1


def test_an_event_leaves_no_graph_behind() -> None:
    """What torch makes of a backward of ours when it looks into it would stay for good, with every graph around it."""
    model = start("bert")
    trained("bert", model, torch.compile(model, backend="eager"), **THRICE)
    torch._dynamo.reset()
    gc.collect()
    left = [thing for thing in gc.get_objects() if type(thing) is torch.fx.Node]
    assert not left, len(left)


def test_without_a_reset_the_limit_is_hit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault that the reset prevents, planted."""
    model = start("bert")
    monkeypatch.setattr("apt.training.controller.controller.forget_graphs", lambda: None)
    with pytest.raises(FailOnRecompileLimitHit):
        trained("bert", model, torch.compile(model, backend="eager"), **THRICE)


@pytest.mark.parametrize("when", ["before, and run", "before", "after"])
def test_compiled_before_or_after_the_patch(when: str, tmp_path: Path) -> None:
    inner, counter = plain("bert"), CompileCounterWithBackend("eager")
    eager = apt.patch_model(copy.deepcopy(inner), rank=3).train()
    model = torch.compile(inner, backend=counter) if when.startswith("before") else inner
    if when == "before, and run":
        model(**tiny_batch("bert"))
    assert apt.patch_model(model, rank=3) is model
    inner.load_state_dict(eager.state_dict())  # the same random start
    model = torch.compile(inner, backend=counter) if when == "after" else model
    counter.frame_count = 0
    loop = trained("bert", model.train(), model, **ONCE)
    assert counter.frame_count == 2
    same_run(loop, trained("bert", eager, eager, **ONCE))
    assert apt.summary(model) == apt.summary(inner)
    apt.export_model(model, tmp_path / "small")
    batch = tiny_batch("bert")
    close("export", apt.load_model(tmp_path / "small")(**batch).logits, inner.eval()(**batch).logits)
    assert apt.unpatch_model(model, merge=True) is model
    assert not list(adapted(inner))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "llama_gqa"])
def test_inductor_computes_the_run(name: str) -> None:
    model = start(name)
    eager = copy.deepcopy(model)
    same_run(trained(name, model, torch.compile(model), **THRICE), trained(name, eager, eager, **THRICE))
