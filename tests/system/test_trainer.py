"""APTrainer: a transformers.Trainer that prunes on the way, resumes exactly, and loses nothing to a NaN."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_model
from tiny_trainer import STEPS, Rows, decisions, losses, trainer
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import TrainerCallback, TrainingArguments

import apt
import apt.training.controller.goal
from apt.files.whole import read_jsonl
from apt.pruning.latency_table import LatencyTable
from apt.records import Event


@pytest.mark.parametrize("name", ["bert", "llama_gqa"])
def test_a_run_prunes_on_its_way(name: str, tmp_path: Path) -> None:
    ran = trainer(tmp_path, name, event_log=tmp_path / "events.jsonl", verify_events=True)
    ran.train()
    assert [event.step for event in ran.controller.events] == [8, 16, 24]
    assert apt.summary(ran.model).sparsity >= 0.6
    assert [Event.from_json(row) for row in read_jsonl(tmp_path / "events.jsonl")] == ran.controller.events
    assert sorted(losses(ran)) == list(range(1, STEPS + 1))
    speed = ran.throughput()
    assert speed.keys() == {"tokens_per_s_before", "tokens_per_s_after"}
    assert all(0 < value < float("inf") for value in speed.values())


def test_evaluation_stands_alone_and_leaves_a_run_as_it_was(tmp_path: Path) -> None:
    plain = trainer(tmp_path / "plain", "llama_gqa")  # new ranks draw from the random state, as a loader does
    plain.train()
    watched = trainer(tmp_path / "watched", "llama_gqa", eval_dataset=Rows(True), eval_strategy="steps", eval_steps=5)
    before = watched.evaluate()["eval_loss"]  # no controller yet
    watched.train()
    seen = [row["eval_loss"] for row in watched.state.log_history if "eval_loss" in row]
    assert len({before, *seen}) == 1 + STEPS // 5
    ours, theirs = watched.model.state_dict(), plain.model.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("strategy", ["steps", "best"])
def test_the_best_model_is_one_of_the_final_size(strategy: str, tmp_path: Path) -> None:
    """The score only falls: the best of all has the old size, so the best is the first one after the last event."""
    falling = iter(range(100, 0, -1))
    settings = {"save_strategy": strategy, "save_steps": 5, "eval_strategy": "steps", "eval_steps": 5}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "score", "greater_is_better": True}
    scores = {"eval_dataset": Rows(), "compute_metrics": lambda _: {"score": next(falling)}}
    ran = trainer(tmp_path, save_total_limit=2, **settings, **best, **scores)
    ran.train()
    assert ran.state.best_global_step == 25  # the last event is at 24
    assert Path(ran.state.best_model_checkpoint) == tmp_path / "checkpoint-25"
    assert json.loads((tmp_path / "checkpoint-25/trainer_state.json").read_text())["best_model_checkpoint"] == str(
        tmp_path / "checkpoint-25"
    )
    assert {path.name for path in tmp_path.glob("checkpoint*")} >= {"checkpoint-25"}
    saved, ours = load_file(tmp_path / "checkpoint-25/model.safetensors"), ran.model.state_dict()
    assert all(torch.equal(ours[key], value) for key, value in saved.items())
    assert apt.summary(ran.model).sparsity >= 0.6
    apt.export_model(ran.model, tmp_path / "small")
    apt.load_model(tmp_path / "small")


def test_a_checkpoint_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped while the random state of the second one is written: the first is there, the second has no name."""
    ran = trainer(tmp_path, save_strategy="steps", save_steps=10, save_total_limit=1)
    save_rng_state = ran._save_rng_state

    def stop(folder: str) -> None:
        save_rng_state(folder)
        if ran.state.global_step == 20:
            raise KeyboardInterrupt

    monkeypatch.setattr(ran, "_save_rng_state", stop)
    with pytest.raises(KeyboardInterrupt):
        ran.train()
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-10", "checkpoint.partial"}
    again = trainer(tmp_path, save_strategy="steps", save_steps=10, save_total_limit=1)
    again.train(resume_from_checkpoint=True)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-30"}
    assert len(again.controller.events) == 3


def test_rows_grouped_by_length_come_in_the_same_order_after_a_resume(tmp_path: Path) -> None:
    """Step 13 lies in the second of eight-step epochs, whose order must not hang on what the first one drew."""
    grouped: dict[str, Any] = {"train_sampling_strategy": "group_by_length", "save_strategy": "steps", "save_steps": 13}
    grouped["train_dataset"] = [Rows()[index] for index in range(64)]
    whole = trainer(tmp_path / "whole", **grouped)
    whole.train()
    again = trainer(tmp_path / "again", **grouped)
    again.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-13"))
    ours, theirs = again.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_an_optimizer_of_the_users_own_resumes(tmp_path: Path) -> None:
    """It is made over all parameters, before the events of the checkpoint are replayed."""

    def made(folder: str, **settings: Any) -> Any:
        ran = trainer(tmp_path / folder, target_sparsity=0.9, save_strategy="steps", save_steps=20, **settings)
        parameters = [p for p in ran.model.parameters() if p.requires_grad]
        ran.optimizer = torch.optim.AdamW(parameters, lr=3e-3)
        return ran

    whole = made("whole")
    whole.train()
    assert 0 in apt.summary(whole.model).units.values()  # a layer that is empty has lost its adapters
    again = made("again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-20"))
    ours, theirs = again.model.state_dict(), whole.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


class Rates(TrainerCallback):
    """The learning rate of every step, as the optimizer has it."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        rates = {group["lr"] for group in kwargs["optimizer"].param_groups}
        assert len(rates) == 1
        self.seen.append(rates.pop())


FALLS = {"linear": lambda done: 1.0 - done, "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done))}


@pytest.mark.parametrize("schedule", FALLS)
def test_one_learning_rate_schedule_for_the_whole_run(schedule: str, tmp_path: Path) -> None:
    """Three events, and each step's rate is the closed form's."""
    rates, warm = Rates(), 6
    ran = trainer(tmp_path, lr_scheduler_type=schedule, warmup_steps=warm, callbacks=[rates])
    ran.train()
    assert [event.step for event in ran.controller.events] == [8, 16, 24]
    fall = FALLS[schedule]
    wanted = [3e-3 * (step / warm if step < warm else fall((step - warm) / (STEPS - warm))) for step in range(STEPS)]
    assert rates.seen == pytest.approx(wanted, rel=1e-12)


def test_throughput_without_events(tmp_path: Path) -> None:
    ran = trainer(tmp_path, max_steps=4, num_events=0, target_sparsity=0.0)
    ran.train()
    speed = ran.throughput()
    assert speed["tokens_per_s_before"] == speed["tokens_per_s_after"] > 0


def test_resumed_behind_the_last_step_there_is_none_to_do(tmp_path: Path) -> None:
    """Step 30 lies within an epoch; at the same learning rate, a step more would show."""
    settings: dict[str, Any] = {"lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": STEPS}
    whole = trainer(tmp_path, **settings)
    whole.train()
    again = trainer(tmp_path, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS}"))
    assert again.state.global_step == STEPS
    ours, theirs = again.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("at", [13, 16, 28], ids=["mid-decay", "at an event", "after the last"])
@pytest.mark.parametrize("name", ["bert", "llama_gqa"])
def test_a_resumed_run_is_the_uninterrupted_one(name: str, at: int, tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", name, save_strategy="steps", save_steps=at)
    whole.train()
    checkpoint = tmp_path / f"whole/checkpoint-{at}"
    again = trainer(tmp_path / "again", name)
    again.train(resume_from_checkpoint=str(checkpoint))
    ours, theirs = again.model.state_dict(), whole.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert {step: loss for step, loss in losses(whole).items() if step > at}.items() <= losses(again).items()
    assert decisions(again) == decisions(whole)


def test_a_checkpoint_in_a_decay_holds_masks_on_their_way(tmp_path: Path) -> None:
    trainer(tmp_path, save_strategy="steps", save_steps=13, max_steps=STEPS).train()
    tensors = load_file(tmp_path / "checkpoint-13/apt_state.safetensors")
    masks = torch.cat([tensor for name, tensor in tensors.items() if name.startswith("masks/")])
    assert ((masks > 0) & (masks < 1)).any()
    state = json.loads((tmp_path / "checkpoint-13/apt_state.json").read_text())
    assert (state["step"], len(state["events"])) == (13, 1)


def test_accumulated_micro_batches_decide_as_one_batch(tmp_path: Path) -> None:
    """Two of four are one of eight: same events, losses equal to the order of additions."""
    runs = []
    for size, times in ((8, 1), (4, 2)):
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": times}
        ran = trainer(tmp_path / str(times), "llama_gqa", train_dataset=Full(), learning_rate=1e-4, **sizes)
        ran.train()
        assert not ran.model_accepts_loss_kwargs  # else what the method adds to the loss would not be divided
        runs.append(ran)
    assert [plan["prune"] for plan in decisions(runs[1])] == [plan["prune"] for plan in decisions(runs[0])]
    assert [plan["rank"] for plan in decisions(runs[1])] == [plan["rank"] for plan in decisions(runs[0])]
    first, second = losses(runs[0]), losses(runs[1])
    assert first.keys() == second.keys()
    assert all(abs(first[step] - second[step]) <= 1e-4 * max(1.0, first[step]) for step in first)


class Full(Rows):
    """No padding, so that every micro-batch has the same number of tokens and their mean losses weigh alike."""

    def __init__(self) -> None:
        super().__init__(decoder=True)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return super().__getitem__(index) | {"attention_mask": torch.ones(8, dtype=torch.long)}


class Spoilt(apt.APTrainer):
    """Its loss, or a gradient, is no number at one step."""

    step, where = 11, "loss"

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step + 1 == self.step and self.where == "loss":
            inputs = {**inputs, "inputs_embeds": torch.full((8, 8, 32), float("nan"))}
            inputs.pop("input_ids")
        loss: Tensor = super().compute_loss(model, inputs, *args, **kwargs)
        if self.state.global_step + 1 == self.step and self.where == "gradient":
            loss.register_hook(lambda grad: grad * float("nan"))
        return loss


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_nan_stops_the_run_and_the_last_good_state_is_saved(where: str, tmp_path: Path) -> None:
    good = trainer(tmp_path / "good", save_strategy="steps", save_steps=10)
    good.train()
    spoilt = trainer(tmp_path / "spoilt", kind=Spoilt)
    spoilt.where = where
    with pytest.raises(FloatingPointError, match=r"at step 11; .* step 10; .*; saved as .*checkpoint-10$"):
        spoilt.train()
    assert all(p.grad is None for p in spoilt.model.parameters())
    saved, wanted = tmp_path / "spoilt/checkpoint-10", tmp_path / "good/checkpoint-10"
    for file in ("model.safetensors", "apt_state.safetensors"):
        assert (saved / file).read_bytes() == (wanted / file).read_bytes()
    again = trainer(tmp_path / "again")
    again.train(resume_from_checkpoint=str(saved))
    assert len(again.controller.events) == 3
    # What the failed forward pass drew for its dropout is drawn again: the run is the one without the NaN.
    ours, theirs = again.model.state_dict(), good.model.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_settings_are_checked_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown setting 'target_sparcity'; did you mean target_sparsity"):
        trainer(tmp_path, target_sparcity=0.5)
    with pytest.raises(ValueError, match="a run of 3 steps is too short for 3 events"):
        trainer(tmp_path, max_steps=3, prune_end=0.4).train()
    with pytest.raises(ValueError, match="not patched"):
        apt.APTrainer(model=tiny_model("bert"), args=TrainingArguments(str(tmp_path), use_cpu=True))


def test_a_checkpoint_of_another_trainer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-5").mkdir()
    with pytest.raises(ValueError, match=r"holds no apt_state\.json; it was not written by APTrainer"):
        trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


AT_ONCE = {"prune_before_tuning": True, "calibration_batches": 3, "num_events": 3, "prune_end": 24}


class Watched(apt.APTrainer):
    """Keeps the batches that it trains on."""

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        self.__dict__.setdefault("seen", []).append(inputs["input_ids"])
        return super().training_step(model, inputs, *args, **kwargs)


def test_one_shot_calibrates_on_training_data_and_disturbs_nothing(tmp_path: Path) -> None:
    ran = trainer(tmp_path / "one", kind=Watched, **AT_ONCE, verify_events=True)
    ran.train()
    assert [(event.step, event.prune is None) for event in ran.controller.events] == [
        (0, False),
        (8, True),
        (16, True),
        (24, True),
    ]
    assert apt.summary(ran.model).sparsity >= 0.6
    speed = ran.throughput()
    assert speed["tokens_per_s_before"] is None  # there is no step before
    assert speed["tokens_per_s_after"] > 0
    plain = trainer(tmp_path / "plain", kind=Watched, num_events=0, target_sparsity=0.0)
    plain.train()
    assert len(ran.seen) == len(plain.seen) == STEPS
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(ran.seen, plain.seen, strict=True))


def test_one_shot_on_a_stream(tmp_path: Path) -> None:
    """A data set without a length is read from its start."""

    class Stream(IterableDataset[dict[str, Any]]):
        def __iter__(self) -> Iterator[dict[str, Any]]:
            return iter(Rows()[index] for index in range(64))

    ran = trainer(tmp_path, train_dataset=Stream(), **AT_ONCE, max_steps=2, adaptive_rank_update=False)
    ran.train()
    assert [event.step for event in ran.controller.events] == [0]
    assert apt.summary(ran.model).sparsity >= 0.6


@pytest.mark.parametrize("at", [4, 20])
def test_a_resumed_one_shot_run_is_the_uninterrupted_one(at: int, tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", "llama_gqa", save_strategy="steps", save_steps=at, **AT_ONCE)
    whole.train()
    again = trainer(tmp_path / "again", "llama_gqa", **AT_ONCE)
    again._calibration_batches = lambda: pytest.fail("calibrated again")
    again.train(resume_from_checkpoint=str(tmp_path / f"whole/checkpoint-{at}"))
    ours, theirs = again.model.state_dict(), whole.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert decisions(again) == decisions(whole)


def test_one_shot_in_bfloat16(tmp_path: Path) -> None:
    """Calibration runs in the precision of training: its activations are narrow, its sums are not."""
    ran = trainer(tmp_path, "llama_gqa", bf16=True, max_steps=2, adaptive_rank_update=False, **AT_ONCE)
    narrow = []
    ran.model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda _, args: narrow.append(args[0].dtype))
    ran.train()
    assert narrow[:3] == [torch.bfloat16] * 3
    assert apt.summary(ran.model).sparsity >= 0.6


def test_a_resumed_run_keeps_the_latency_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {"layers.heads": [[0, 0.0], [4, 2.0]], "layers.neurons": [[0, 0.0], [40, 3.0]]}
    table = LatencyTable(device="paper", batch_size=4, length=8, dense_ms=16.0, rest_ms=1.0, parts=parts)
    monkeypatch.setattr(apt.training.controller.goal, "measure_latency", lambda *_: table)
    whole = trainer(tmp_path / "whole", target_speedup=2.0, save_strategy="steps", save_steps=13)
    whole.train()
    assert whole.controller.events[-1].predicted_speedup >= 2.0
    monkeypatch.setattr(apt.training.controller.goal, "measure_latency", lambda *_: pytest.fail("measured again"))
    again = trainer(tmp_path / "again", target_speedup=2.0)
    again.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-13"))
    ours, theirs = again.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert decisions(again) == decisions(whole)
