"""Repair "stream": layers called again alone, the closed form of a residual, and what the sweep leaves of a model."""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from check import close
from own_loop import Loop, equal_bits, patched
from tiny_models import NAMES, fill_adapters, tiny_batch, tiny_model
from torch import Tensor, nn

import apt
from apt.families import anatomy_of
from apt.layers import adapted
from apt.layers.passes import passes_of
from apt.pruning import UnitScores, UnitSearch
from apt.pruning.units import block_params, find_units
from apt.repair.calls import recording
from apt.repair.residual import Residual, solve_residual
from apt.repair.stream import Sweep
from apt.surgery.prune import apply_prune_plan
from apt.training.controller.calibrated_cut import CalibratedCut
from apt.training.controller.calibration import model_loss

STREAM: dict[str, Any] = {"repair": "stream", "salience": "fisher", "kurtosis": "off", "round_to": 1}
PRE_NORM = ["llama_gqa", "gpt2", "opt", "phi3", "t5"]


def batches(name: str, count: int = 9) -> list[dict[str, Tensor]]:
    return [tiny_batch(name, seed=seed) for seed in range(count)]


def cut(model: Any, name: str, sparsity: float = 0.4, **settings: Any) -> Any:
    """The plan of a calibrated cut, which leaves masks and weights as they are at the cut."""
    config = apt.surgery.patch_state(model).config.pruning
    units, search = UnitScores(anatomy_of(model), config), UnitSearch(block_params(anatomy_of(model)), config)

    def choose(scores: dict[str, Tensor], part: float) -> Any:
        return search.plan(units.groups, scores, search.total, 0, part * sparsity)

    return CalibratedCut(model, units, batches(name), model_loss, 2).carry_out(choose, **settings)


@contextmanager
def heard(layers: list[nn.Module]) -> Iterator[list[Tensor]]:
    """The streams behind these layers, in the order of their calls."""
    found: list[Tensor] = []

    def hear(module: nn.Module, given: Any, answer: Any) -> None:
        found.append(answer[0] if isinstance(answer, tuple) else answer)

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_hook(hear).remove)
        yield found


def hooks_of(model: Any) -> list[int]:
    return [len(linear._forward_hooks) + len(linear._forward_pre_hooks) for _, linear in adapted(model)]


@torch.no_grad()
def logits(model: Any, name: str, seed: int = 77) -> Tensor:
    found: Tensor = model.eval()(**tiny_batch(name, seed=seed)).logits
    return found


@pytest.mark.parametrize("with_bias", [False, True])
def test_a_residual_is_fitted_by_ridge_regression(with_bias: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(200, 6, generator=draw, dtype=torch.float64) + 0.5
    r = x @ torch.randn(6, 3, generator=draw, dtype=torch.float64) + torch.randn(200, 3, generator=draw).double() + 2.0
    kept = torch.tensor([0, 1, 3, 5])
    parts = []
    for rows in (slice(0, 150), slice(150, 200)):
        parts.append(Residual.zeros(4, 3, x.device, x.dtype))
        parts[-1].add(x[rows][:, kept], r[rows])
    found = solve_residual(*parts, with_bias=with_bias)
    assert found.ridge is not None
    mean_x, mean_r = (x[:, kept].mean(0), r.mean(0)) if with_bias else (torch.zeros(4), torch.zeros(3))
    of_x, of_r = x[:, kept] - mean_x, r - mean_r
    second = of_x.T @ of_x / 200
    damped = second + found.ridge * second.diagonal().mean() * torch.eye(4, dtype=torch.float64)
    wanted = torch.linalg.solve(damped, of_x.T @ of_r / 200).T
    close("weight", found.weight, wanted)
    if with_bias:
        close("bias", found.bias, mean_r - wanted @ mean_x)
    assert found.before == pytest.approx(float(r[150:].square().sum(1).mean()))
    assert found.after < found.before


def test_a_residual_that_inputs_know_nothing_of_changes_nothing() -> None:
    draw = torch.Generator().manual_seed(1)
    parts = []
    for _ in range(2):
        parts.append(Residual.zeros(8, 2, torch.device("cpu"), torch.float64))
        parts[-1].add(torch.randn(9, 8, generator=draw).double(), torch.randn(9, 2, generator=draw).double())
    found = solve_residual(*parts, with_bias=False)
    assert found.ridge is None
    assert not found.weight.any()
    assert found.after == found.before


@pytest.mark.parametrize("name", NAMES)
def test_layers_called_again_alone_give_the_streams_of_the_model(name: str) -> None:
    """Of every stack, with padding; a decoder reads what its encoder gave."""
    model = patched(name).eval()
    anatomy, batch = anatomy_of(model), tiny_batch(name)
    for stack in anatomy.stacks:
        layers = [layer.module for layer in anatomy.layers if layer.stack == stack]
        with heard(layers) as seen, torch.no_grad():
            model(**batch)
        valid = next(g.mask.valid for g in find_units(anatomy) if g.part.layer.stack == stack)
        with torch.no_grad(), recording(layers, passes_of(model), valid) as recorded:
            model(**batch)
        (stream,) = recorded.streams
        with torch.no_grad():
            for layer, (call,), wanted in zip(layers, recorded.calls, seen, strict=True):
                stream = call.again(layer, stream, passes_of(model))
                assert torch.equal(stream, wanted)
        assert all("forward" not in vars(layer) for layer in layers)


@pytest.mark.parametrize("name", PRE_NORM)
def test_the_stream_is_nearer_to_that_of_the_model_as_it_was(name: str) -> None:
    """Behind the last layer, on the tokens that it was fitted to."""
    drift = {}
    for repair in ("weights", "stream"):
        model = patched(name, **{**STREAM, "repair": repair})
        streams: dict[bool, list[Tensor]] = {}
        for after in (False, True):
            if after:
                plan = cut(model, name)
            last = anatomy_of(model).layers[-1].module
            with heard([last]) as streams[after], torch.no_grad():
                for batch in batches(name):
                    model.eval()(**batch)
        pairs = zip(streams[False], streams[True], strict=True)
        drift[repair] = sum(float((was - now).square().sum()) for was, now in pairs)
        assert any(note.stream is not None for note in plan.repair.values()) == (repair == "stream")
    assert drift["stream"] < drift["weights"]


@pytest.mark.parametrize("name", ["bert", "deberta", "distilbert"])
def test_layers_that_are_no_sum_are_left_as_they_are(name: str) -> None:
    """A norm stands behind the sum in a post-norm model."""
    found = []
    for repair in ("weights", "stream"):
        model = patched(name, **{**STREAM, "repair": repair})
        plan = cut(model, name)
        found.append((logits(model, name), plan))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


@pytest.mark.parametrize("name", PRE_NORM)
def test_masked_and_corrected_is_shrunk_and_corrected(name: str) -> None:
    model = fill_adapters(patched(name, **STREAM))
    plan = cut(model, name)
    masked = logits(model, name)
    apply_prune_plan(model, plan)
    close("logits", logits(model, name), masked)


@pytest.mark.parametrize("name", ["llama_gqa", "t5"])
def test_where_nothing_goes_no_bit_moves(name: str) -> None:
    model = patched(name, **STREAM)
    before = copy.deepcopy(model.state_dict())
    plan = cut(model, name, 0.0)
    assert plan.repair == {}
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_a_teacher_keeps_what_was_corrected_too() -> None:
    """Also of layers that lost nothing themselves."""
    model = fill_adapters(patched("llama_gqa", **STREAM))
    distiller = apt.SelfDistiller(model)
    wanted = logits(model, "llama_gqa")
    distiller.snapshot()
    plan = cut(model, "llama_gqa", keep_dense=True)
    apply_prune_plan(model, plan, keep_tail=True)
    with torch.no_grad():
        taught = distiller.forward_teacher(tiny_batch("llama_gqa", seed=77)).predictions["logits"]
    close("the teacher's logits", taught, wanted)


@pytest.mark.parametrize("name", ["llama_gqa", "t5"])
def test_a_sweep_that_is_broken_off_leaves_the_model_as_it_was(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = patched(name, **STREAM)
    before = copy.deepcopy(model.state_dict())
    hooks = hooks_of(model)
    plain, done = Sweep._correct, []

    def breaks(self: Any, *args: Any) -> list[Tensor]:
        done.append(plain(self, *args))
        if len(done) == 3:
            raise KeyboardInterrupt
        return done[-1]

    monkeypatch.setattr(Sweep, "_correct", breaks)
    with pytest.raises(KeyboardInterrupt):
        cut(model, name)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert not any(group.mask.masked for group in find_units(anatomy_of(model)))
    assert hooks_of(model) == hooks
    assert all("forward" not in vars(layer.module) for layer in anatomy_of(model).layers)


def test_a_run_is_resumed_to_the_same_bits(tmp_path: Path) -> None:
    settings = {"target_sparsity": 0.5, "num_events": 2, "prune_end": 0.6, "moment_batches": 4, **STREAM}
    given = apt.Calibration(lambda step: [tiny_batch("llama_gqa", seed=1000 + step + number) for number in range(4)])

    def begun() -> Loop:
        torch.manual_seed(5)
        return Loop("llama_gqa", patched("llama_gqa", **settings), calibration=given)

    whole = begun().take(20)
    assert any(note.stream is not None for event in whole.run.events for note in event.prune.repair.values())
    with torch.random.fork_rng():
        fresh = patched("llama_gqa", **settings)
    other = begun().take(9).resumed(fresh, tmp_path / "at", calibration=given).take(11)
    assert equal_bits(other.model, whole.model)
    assert [event.prune for event in other.run.events] == [event.prune for event in whole.run.events]


def test_with_layers_that_go_the_others_are_corrected() -> None:
    model = apt.compress(
        tiny_model("llama_gqa"), batches("llama_gqa"), 0.4, repair="stream", unit_types=["layer"], round_to=1
    )
    (event,) = apt.surgery.patch_state(model).past
    assert apt.summary(model).sparsity >= 0.3
    assert event.prune is not None


def test_hidden_dimensions_are_refused() -> None:
    with pytest.raises(ValueError, match="repair 'stream' compares streams of one width"):
        apt.APTConfig().with_overrides(repair="stream", unit_types=["head", "hidden"])


@pytest.mark.parametrize("method", ["dynacsg", "lora", "gsa"])
def test_every_delta_is_corrected_in_its_pass(method: str) -> None:
    settings = {"method": method, "prune": True, "target_modules": ["q", "v", "o", "down"]}
    model = patched("llama_gqa", **STREAM, **settings)
    plan = cut(model, "llama_gqa")
    masked = logits(model, "llama_gqa")
    apply_prune_plan(model, plan)
    close("logits", logits(model, "llama_gqa"), masked)
    assert any(note.stream is not None for note in plan.repair.values())
