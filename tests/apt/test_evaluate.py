"""Scores do not depend on batches and padding; timings are of the models and events they claim to be of."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tiny_models import tiny_model
from tiny_run import sentences, tiny_bert, tiny_tokenizer, write_csv
from torch import nn

import apt
from apt.records import Event, PrunePlan, RankPlan, TrimPlan
from apt.runs.config import DataConfig, EvaluationConfig
from apt.runs.data import DatasetLoader
from apt.runs.evaluation.evaluate import Evaluator, latency_ms, live_bytes, saved_bytes, time_events
from apt.runs.tasks import TASKS
from apt.surgery.prune import apply_prune_plan


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads of a layer this small wait for each other longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture
def data(tmp_path: Path, tokenizer: Any) -> DatasetLoader:
    path = write_csv(tmp_path / "a.csv", sentences(40))
    return DatasetLoader(DataConfig(datasets=str(path), test_size=21), tokenizer)


def test_predictions_come_in_the_order_of_the_data(tokenizer: Any, data: DatasetLoader) -> None:
    model = tiny_bert().train()
    model.bert.eval()
    logits, labels = Evaluator(tokenizer, EvaluationConfig(inference_batch_size=4)).predict(model, data.test)
    assert labels.tolist() == data.test.columns["labels"]
    assert model.training  # every module has the mode it had
    assert not model.bert.training
    model.eval()
    for i in range(len(data.test)):
        ids = torch.tensor([data.test[i]["input_ids"]])
        np.testing.assert_allclose(logits[i], model(input_ids=ids).logits[0].detach().numpy(), atol=1e-5)


@pytest.mark.parametrize("end", [None, 1, 59])
@pytest.mark.parametrize("kind", ["T5ForConditionalGeneration", "T5ForSequenceClassification"])
def test_encoder_decoders_are_timed(kind: str, end: int | None) -> None:
    if end is None and kind == "T5ForSequenceClassification":
        end = 0
    model = getattr(transformers, kind)(tiny_model("t5", eos_token_id=end).config)
    seen: list[dict[str, Any]] = []
    hook = model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    found = latency_ms({"a": model, "b": model}, batch_size=9, length=40, vocab_size=60, repeats=2)
    hook.remove()
    assert min(found.values()) > 0
    assert all(kwargs["decoder_input_ids"].shape == (9, 40) for kwargs in seen)
    assert end is None or ((seen[0]["input_ids"] == end).sum(1) == 1).all()


def test_evaluate_gives_the_metrics(tokenizer: Any, data: DatasetLoader) -> None:
    model, evaluator = tiny_bert(), Evaluator(tokenizer, EvaluationConfig(inference_batch_size=8))
    logits, labels = evaluator.predict(model, data.test)
    scores = TASKS["classification"].score(evaluator, model, data)
    assert scores["accuracy"] == pytest.approx((logits.argmax(1) == labels).mean())


class Recorder(nn.Module):
    """Notes who was called, and with what."""

    def __init__(self, name: str, calls: list[str]) -> None:
        super().__init__()
        self.name, self.calls = name, calls
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        assert torch.is_inference_mode_enabled()
        assert not self.training
        assert input_ids.shape == attention_mask.shape == (3, 5)
        assert int(input_ids.max()) < 11
        assert bool(attention_mask.all())
        self.calls.append(self.name)
        return self.weight


def test_latency_takes_the_models_in_turns() -> None:
    calls: list[str] = []
    models = {name: Recorder(name, calls) for name in ("dense", "small")}
    times = latency_ms(models, batch_size=3, length=5, vocab_size=11, repeats=4)
    assert set(times) == {"dense", "small"}
    assert min(times.values()) > 0.0
    # Three warm-ups and four timed ones of each.
    assert calls == ["dense", "small"] * 7
    assert all(model.training for model in models.values())


def event(step: int, kept: dict[str, list[int]], removed: float, ranks: dict[str, int]) -> Event:
    return Event(
        step=step,
        prune=PrunePlan(step=step, target_sparsity=0.5, kept=kept, round_to=8),
        rank=RankPlan(step=step, budget=0, ranks=ranks),
        target_sparsity=0.5,
        sparsity=0.5,
        removed=removed,
        block_params=0,
        trainable_params=0,
        seconds=0.0,
    )


def test_events_are_replayed_and_timed() -> None:
    models = []

    def make_model() -> nn.Module:
        models.append(apt.patch_model(tiny_bert(), target_modules=("q", "up")))
        return models[-1]

    first = {"layers.0.heads": [0, 2], "layers.0.neurons": list(range(64))}
    second = {"layers.1.neurons": list(range(0, 64, 2))}
    third = {"layers.0.heads": [1], "layers.1.heads": []}
    grown = {"bert.encoder.layer.0.attention.self.query": 12}
    events = [event(4, first, 0.2, grown), event(8, second, 0.029, {}), event(12, third, 0.2, {})]
    ids = torch.randint(5, 40, (4, 6), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1, 0, 1])}
    rows = time_events(make_model, events, batch, steps=2)
    # The second one removes too little to be timed, and is carried out all the same.
    assert [row["step"] for row in rows] == [4, 12]
    assert len(models) == 1
    counts = apt.summary(models[0])
    assert (counts.heads, counts.neurons) == ([1, 0], [64, 32])
    assert counts.ranks["bert.encoder.layer.0.attention.self.query"] == 12
    for row in rows:
        assert row["ratio"] == pytest.approx(row["ms_before"] / row["ms_after"])
        assert row["ratio_pruned"] == pytest.approx(row["ms_before"] / row["ms_pruned"])
        assert row["ms_after"] > 0.0
        assert row["saved_mb_pruned"] < row["saved_mb_before"]
        assert row["live_mb_pruned"] < row["live_mb_before"]
    assert rows[0]["live_mb_after"] > rows[0]["live_mb_pruned"]  # the rank grew there
    with_grad = {name for name, p in models[0].named_parameters() if p.grad is not None}
    assert with_grad == {name for name, p in models[0].named_parameters() if p.requires_grad}


def test_ranks_that_went_for_good_are_replayed_once() -> None:
    model = apt.patch_model(tiny_bert(), method="adalora", init_r=6, target_modules=("q",))
    name = "bert.encoder.layer.0.attention.self.query"
    trim = TrimPlan(step=4, kept={name: [0, 5]})
    events = [replace(event(4, {}, 0.0, {}), prune=None, rank=None, trim=trim)]
    assert time_events(lambda: model, events, {}, steps=1) == []
    assert apt.summary(model).ranks[name] == 2


def test_saved_bytes_of_a_known_graph() -> None:
    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = x @ self.weight  # keeps x, an input, and the weight: neither counts
            return h * h.view_as(h)  # keeps h twice: one storage

    assert saved_bytes(Square(), {"x": torch.ones(7, 3)}) == 7 * 5 * 4


def test_live_bytes_leave_out_what_lies_behind_a_view() -> None:
    model = apt.patch_model(tiny_bert(), target_modules=("q",))
    whole = live_bytes(model)
    assert whole == sum(p.numel() * p.element_size() for p in model.parameters())
    plan = PrunePlan(step=1, target_sparsity=0.1, kept={"layers.0.neurons": list(range(60))}, round_to=1)
    free = copy.deepcopy(model)
    apply_prune_plan(free, plan)
    apply_prune_plan(model, plan, keep_tail=True)
    assert live_bytes(model) == live_bytes(free) == sum(p.numel() * p.element_size() for p in free.parameters())
    assert live_bytes(model) < whole
