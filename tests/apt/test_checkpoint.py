"""A run saved in its middle and taken up elsewhere; runs and models side by side that do not meet."""

import copy
from pathlib import Path

import pytest
import torch
from own_loop import BRIEF, Loop, equal_bits, patched

import apt
from apt.checkpoint import load_controller, restore_shapes, save_controller


@pytest.mark.parametrize("name", ["bert", "gpt2", "phi3"])
def test_state_dict_round_trip_in_the_middle_of_a_decay(name: str, tmp_path: Path) -> None:
    """Through files, onto a model patched anew: both go on alike, bit for bit."""
    settings = {"target_sparsity": 0.6, "num_events": 3, "prune_end": 24, "round_to": 4}
    first = Loop(name, patched(name), 30, **settings).take(12)
    assert len(first.run.events) == 1
    assert apt.summary(first.model).masked > 0
    save_controller(first.run, tmp_path)

    model = patched(name)
    random_state = torch.get_rng_state()
    restore_shapes(model, tmp_path)
    assert torch.equal(torch.get_rng_state(), random_state)
    model.load_state_dict(first.model.state_dict())
    second = Loop(name, model, 30, **settings)
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    load_controller(second.run, tmp_path)
    second.step = first.step
    ours, theirs = second.run.state_dict(), first.run.state_dict()
    assert all(ours[key] == theirs[key] for key in ("step", "events", "start_params"))
    for table in ("salience", "importance", "masks"):
        assert ours[table].keys() == theirs[table].keys()
        assert all(torch.equal(ours[table][name], theirs[table][name]) for name in theirs[table])
    for loop in (first, second):
        torch.manual_seed(5)
        loop.take(18)
    assert len(first.run.events) == 3
    assert equal_bits(second.model, first.model)


def test_a_folder_without_a_state(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"checkpoint: .* holds no apt_state.json; it was not written by APTrainer"):
        restore_shapes(patched("bert"), tmp_path)


def test_two_runs_side_by_side_do_not_meet() -> None:
    settings = {"target_sparsity": 0.6, "adaptive_rank_update": False, **BRIEF}
    starts = {name: patched(name) for name in ("bert", "llama_gqa")}
    alone = {name: Loop(name, copy.deepcopy(start), 30, **settings).take(20) for name, start in starts.items()}
    together = {name: Loop(name, copy.deepcopy(start), 30, **settings) for name, start in starts.items()}
    for _ in range(20):
        for loop in together.values():
            loop.take(1)
    for name in starts:
        assert equal_bits(together[name].model, alone[name].model)
        assert len(together[name].run.events) == 3


def test_a_copy_of_a_patched_model_trains_on_its_own() -> None:
    model = patched("bert")
    kept = copy.deepcopy(model.state_dict())
    twin = Loop("bert", copy.deepcopy(model), 30, target_sparsity=0.6, **BRIEF).take(20)
    assert apt.summary(twin.model).sparsity >= 0.6
    assert apt.summary(model).sparsity == 0.0
    assert all(torch.equal(tensor, kept[key]) for key, tensor in model.state_dict().items())
    assert model._apt.valid["layers"].mask is None  # the copy's batches went to the copy's gates
