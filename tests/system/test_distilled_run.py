"""Self-distillation inside a transformers.Trainer: end to end, in the log, accumulated, resumed, its held-out slice."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import STEPS, Full, Rows, decisions, losses, trainer
from tiny_run import write_config

import apt
from apt.cli import main
from apt.distillation import SelfDistiller
from apt.files.whole import read_jsonl
from apt.layers import adapted

# Events after steps 8, 16 and 24; the teacher is taken after step 3 and goes after step 27.
TAUGHT = {"use_self_distillation": True, "distill_end": 27}


def rows_of(ran: apt.APTrainer, name: str) -> dict[int, float]:
    return {row["step"]: row[name] for row in ran.state.log_history if name in row}


@pytest.mark.parametrize("name", ["bert", "llama_gqa"])
def test_a_run_with_a_teacher(name: str, tmp_path: Path) -> None:
    ran = trainer(tmp_path, name, verify_events=True, gradient_checkpointing=name == "bert", **TAUGHT)
    ran.train()
    assert [event.step for event in ran.controller.events] == [8, 16, 24]
    assert apt.summary(ran.model).sparsity >= 0.6
    assert ran.controller.distillation.over
    task, distilled, mu = (rows_of(ran, key) for key in ("task_loss", "distill_loss", "mu"))
    assert list(task) == list(distilled) == list(mu) == list(range(9, 28))
    start = ran.controller.timeline.pruning.start
    assert mu == pytest.approx({step: min(1.0, (step - start) / (24 - start)) for step in mu})
    for step, loss in losses(ran).items():
        if step in mu:
            assert loss == pytest.approx(mu[step] * distilled[step] + (1 - mu[step]) * task[step], abs=2e-4)
    small = apt.load_model(apt.export_model(ran.model, tmp_path / "small"))
    batch = {key: value[None] for key, value in Rows()[0].items() if key != "labels"}
    with torch.no_grad():
        ours, theirs = (model.eval()(**batch).logits for model in (small, ran.model))
    assert torch.allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("at", [5, 13, 16, 28], ids=["first decay", "mid-decay", "at an event", "after its end"])
@pytest.mark.parametrize("name", ["bert", "llama_gqa"])
def test_a_resumed_run_is_the_uninterrupted_one(name: str, at: int, tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", name, save_strategy="steps", save_steps=at, **TAUGHT)
    whole.train()
    again = trainer(tmp_path / "again", name, **TAUGHT)
    again.train(resume_from_checkpoint=str(tmp_path / f"whole/checkpoint-{at}"))
    ours, theirs = again.model.state_dict(), whole.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert {step: loss for step, loss in losses(whole).items() if step > at}.items() <= losses(again).items()
    assert decisions(again) == decisions(whole)


def test_accumulated_micro_batches_distil_as_one_batch(tmp_path: Path) -> None:
    """Two of four are one of eight, while every layer is compared; the distillation is divided like the task's loss."""
    runs = []
    for size, times in ((8, 1), (4, 2)):
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": times}
        ran = trainer(tmp_path / str(times), "llama_gqa", train_dataset=Full(), learning_rate=1e-4, **sizes, **TAUGHT)
        ran.train()
        runs.append(ran)
    assert [plan["prune"] for plan in decisions(runs[1])] == [plan["prune"] for plan in decisions(runs[0])]
    for read in (losses, lambda ran: rows_of(ran, "distill_loss"), lambda ran: rows_of(ran, "mu")):
        first, second = read(runs[0]), read(runs[1])
        assert first.keys() == second.keys()
        assert all(abs(first[step] - second[step]) <= 3e-4 * max(1.0, first[step]) for step in first)


def test_a_held_out_slice_is_never_trained_on_and_random_states_stay(tmp_path: Path) -> None:
    """The run with a slice that is never worth it equals a run on the rest of the data alone."""
    plain = trainer(tmp_path / "plain", **TAUGHT)
    held = trainer(tmp_path / "held", teacher_refresh=True, held_out_share=0.25, **TAUGHT)
    assert (len(held.train_dataset), len(plain.train_dataset)) == (48, 64)
    asked: list[float] = []
    whole = held._batches_of(held._held_out)
    assert sum(len(batch["labels"]) for batch in whole) == 16
    texts = {tuple(row["input_ids"].tolist()) for row in held.train_dataset}
    assert not texts & {tuple(row) for batch in whole for row in batch["input_ids"].tolist()}
    held._batches_of = lambda dataset: lambda model: asked.append(0.0) or float(len(asked))
    held.train()
    assert held.controller.distillation.snapshots == [3]
    assert len(asked) == 3
    rest = trainer(tmp_path / "rest", train_dataset=held.train_dataset, **TAUGHT)
    rest.train()
    ours, theirs = held.model.state_dict(), rest.model.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_better_student_becomes_the_teacher_in_a_trainer(tmp_path: Path) -> None:
    """Scores are real ones: where the student learns quickly, its held-out loss falls below that of its teacher."""
    ran = trainer(
        tmp_path, teacher_refresh=True, held_out_share=0.25, target_sparsity=0.2, learning_rate=1e-2, **TAUGHT
    )
    scores: list[float] = []
    original: Any = None

    def kept(self: SelfDistiller) -> None:
        original(self)
        scores.append(float(sum(module.n_out for _, module in adapted(self.model))))

    original = SelfDistiller.snapshot
    SelfDistiller.snapshot = kept  # type: ignore[method-assign]
    try:
        ran.train()
    finally:
        SelfDistiller.snapshot = original  # type: ignore[method-assign]
    assert len(scores) == len(ran.controller.distillation.snapshots)
    assert scores == sorted(scores, reverse=True)


def test_a_distilled_run_from_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"use_self_distillation": True, "distill_end": 0.45, "tau": "2"}
    sizes = {"training": {"max_steps": 160}, "evaluation": {"event_timing_steps": 0}}
    config = write_config(tmp_path, distillation=settings, **sizes)
    assert main(["train", str(config)]) == 0
    metrics = json.loads((tmp_path / "run/metrics.json").read_text(encoding="utf-8"))
    events = [row["step"] for row in read_jsonl(tmp_path / "run/events.jsonl")]
    assert metrics["self_distillation"].items() >= {"first_step": events[0] + 1, "last_step": 72}.items()
    assert metrics["accuracy"] == metrics["accuracy_before_export"] >= 0.9
    (taken,) = metrics["self_distillation"]["teacher_of_steps"]
    assert f"{events[0] + 1} to 72, teacher of {taken}" in capsys.readouterr().out
    assert "tau: 2.0" in (tmp_path / "run/config.yaml").read_text(encoding="utf-8")


def test_an_optimizer_of_one_s_own_gets_tr_before_its_state_is_loaded(tmp_path: Path) -> None:
    def made(folder: str, **settings: Any) -> Any:
        ran = trainer(tmp_path / folder, **settings, **TAUGHT)
        mine = [p for n, p in ran.model.named_parameters() if p.requires_grad and not n.startswith("apt_transform")]
        ran.optimizer = torch.optim.AdamW(mine, lr=3e-3)
        return ran

    whole = made("whole", save_strategy="steps", save_steps=13)
    whole.train()
    again = made("again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-13"))
    assert losses(again)[STEPS] == losses(whole)[STEPS]
