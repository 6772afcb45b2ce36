"""A run saved in its middle and taken up elsewhere; runs and models side by side that do not meet."""

import copy
import importlib
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from own_loop import BRIEF, Loop, equal_bits, patched
from safetensors import SafetensorError
from tiny_models import tiny_model

import apt
from apt.files.whole import read_jsonl
from apt.training.checkpoint import load_controller, restore_shapes, save_controller


@pytest.mark.parametrize("name", ["bert", "gpt2", "phi3"])
def test_the_parts_of_a_resume_in_the_middle_of_a_decay(name: str, tmp_path: Path) -> None:
    """By the names that pages gave before `apt.save_checkpoint`: onto a model patched anew, bit for bit."""
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


DROPPED = {"target_sparsity": 0.6, "num_events": 3, "prune_end": 24, "round_to": 4}  # events after 8, 16 and 24 steps


def test_a_loop_of_ones_own_resumes_bit_for_bit(tmp_path: Path) -> None:
    """With dropout, so that the random states are part of it; the numbers of optimizer and scaler too."""
    first = Loop("bert", patched("bert", torch.float32, 0.1), 30, event_log=tmp_path / "first.jsonl", **DROPPED)
    folder = apt.save_checkpoint(first.take(12).run, tmp_path / "checkpoint")
    names = {"apt_run.json", "apt_state.json", "apt_state.safetensors", "model.safetensors", "optimizer.safetensors"}
    names.add("apt_files.json")
    assert {path.name for path in folder.iterdir()} == names
    first.take(18)
    drawn = torch.rand(3), np.random.rand(3), random.random()

    model = patched("bert", torch.float32, 0.1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)  # what is not restored is seen
    second = Loop("bert", model, 0)
    log = tmp_path / "second.jsonl"
    log.write_text((tmp_path / "first.jsonl").read_text())  # with events that will come again
    second.run = apt.resume_checkpoint(folder, model, second.optimizer, event_log=log, **DROPPED)
    assert len(read_jsonl(log)) == len(second.run.events) == 1
    second.step = second.run.step
    second.take(18)
    assert equal_bits(second.model, first.model)
    assert [row["prune"] for row in read_jsonl(log)] == [row["prune"] for row in read_jsonl(tmp_path / "first.jsonl")]
    assert torch.equal(torch.rand(3), drawn[0])
    assert np.array_equal(np.random.rand(3), drawn[1])
    assert random.random() == drawn[2]
    ours, theirs = second.optimizer.state_dict(), first.optimizer.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    for number, moments in theirs["state"].items():
        assert all(torch.equal(ours["state"][number][key], value) for key, value in moments.items())


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW], ids=["no state", "a learning rate in a tensor"])
def test_an_optimizer_comes_back_as_it_was(kind: Any, tmp_path: Path) -> None:
    def make(parameters: list[Any]) -> Any:
        rate = torch.tensor(1e-3) if kind is torch.optim.AdamW else 1e-3
        return kind([{"params": parameters[:2], "lr": rate}, {"params": parameters[2:]}], lr=1e-3)

    first = Loop("bert", patched("bert"), 30, optimizer=make, **DROPPED).take(3)
    apt.save_checkpoint(first.run, tmp_path / "checkpoint")
    second = Loop("bert", patched("bert"), 0, optimizer=make)
    apt.resume_checkpoint(tmp_path / "checkpoint", second.model, second.optimizer, **DROPPED)
    assert second.optimizer.state_dict()["param_groups"] == first.optimizer.state_dict()["param_groups"]
    assert isinstance(second.optimizer.param_groups[0]["lr"], torch.Tensor) == (kind is torch.optim.AdamW)


def test_a_gradient_scaler_gets_its_state_back(tmp_path: Path) -> None:
    scalers = [torch.amp.GradScaler("cpu", init_scale=scale) for scale in (8.0, 2.0)]
    for scaler in scalers:
        scaler.scale(torch.ones(()))  # made at its first use
    first = Loop("bert", patched("bert"), 30, scaler=scalers[0], **DROPPED)
    apt.save_checkpoint(first.run, tmp_path / "checkpoint")
    second = Loop("bert", patched("bert"), 0)
    apt.resume_checkpoint(tmp_path / "checkpoint", second.model, second.optimizer, scaler=scalers[1], **DROPPED)
    assert scalers[1].state_dict() == scalers[0].state_dict()


def test_a_save_that_fails_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop("bert", patched("bert"), 30, **DROPPED).take(2)
    folder = apt.save_checkpoint(loop.run, tmp_path / "checkpoint")
    loop.take(2)
    with monkeypatch.context() as patch:
        patch.setattr("apt.training.checkpoint.OPTIMIZER", "no such folder/optimizer.safetensors")
        with pytest.raises((OSError, SafetensorError)):
            apt.save_checkpoint(loop.run, folder)
    other = Loop("bert", patched("bert"), 0)
    assert apt.resume_checkpoint(folder, other.model, other.optimizer, **DROPPED).step == 2
    apt.save_checkpoint(loop.run, folder)
    other = Loop("bert", patched("bert"), 0)
    assert apt.resume_checkpoint(folder, other.model, other.optimizer, **DROPPED).step == 4
    assert list(tmp_path.iterdir()) == [folder]


def test_folders_that_are_no_checkpoint(tmp_path: Path) -> None:
    loop = Loop("bert", patched("bert"), 30, **DROPPED)
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"checkpoint: .* exists and is no checkpoint of a loop; it stays"):
        apt.save_checkpoint(loop.run, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(ValueError, match=r"holds no apt_run.json; it was not written by apt.save_checkpoint"):
        apt.resume_checkpoint(tmp_path, loop.model, loop.optimizer)
    folder = apt.save_checkpoint(loop.run, tmp_path / "checkpoint")
    other = Loop("bert", apt.patch_model(tiny_model("bert"), rank=2), 0)
    with pytest.raises(ValueError, match="was patched with rank=3, this one with 2; patch it as that run did"):
        apt.resume_checkpoint(folder, other.model, other.optimizer, **DROPPED)
    other = Loop("bert", apt.patch_model(tiny_model("bert", intermediate_size=48), rank=3), 0)
    with pytest.raises(ValueError, match=r"model.safetensors does not fit the model, patch it as the run's was: size"):
        apt.resume_checkpoint(folder, other.model, other.optimizer, **DROPPED)


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


def test_the_old_names_warn_and_are_the_same() -> None:
    import apt.training.checkpoint

    sys.modules.pop("apt.checkpoint", None)
    with pytest.warns(DeprecationWarning, match="apt.save_checkpoint"):
        old = importlib.import_module("apt.checkpoint")

    for name in ("save_controller", "load_controller", "restore_shapes"):
        assert getattr(old, name) is getattr(apt.training.checkpoint, name)
