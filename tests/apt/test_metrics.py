"""Scores by hand: each metric on a few predictions whose score a pencil finds."""

import math

import numpy as np
import pytest
import torch
from tiny_models import tiny_model

from apt.runs.evaluation.metrics import classification_metrics, regression_metrics, rouge_metrics
from apt.runs.models import positions
from apt.training.batches import micro_batch_weights


def test_classes() -> None:
    logits = np.array([[2.0, 1.0], [0.0, 1.0], [0.0, 3.0], [1.0, 0.0], [0.0, 1.0]])
    scores = classification_metrics((logits, np.array([0, 1, 0, 1, 1])))
    # Class 1: two hits, one false alarm, one miss; class 0: one hit.
    assert scores == {
        "accuracy": pytest.approx(0.6),
        "f1": pytest.approx(2 / 3),
        "matthews": pytest.approx((2 * 1 - 1 * 1) / math.sqrt(3 * 3 * 2 * 2)),
    }
    assert classification_metrics((logits[:1], np.array([0]))) == {"accuracy": 1.0, "f1": 0.0, "matthews": 0.0}
    three = classification_metrics((np.eye(3)[[0, 1, 1, 2]], np.array([0, 1, 2, 2])))
    assert three["f1"] == pytest.approx((1.0 + 2 / 3 + 2 / 3) / 3)  # the mean over the classes


def test_numbers() -> None:
    values, labels = np.array([[1.0], [2.0], [9.0]]), np.array([1.0, 2.0, 3.0])
    scores = regression_metrics((values, labels))
    assert scores == {
        "pearson": pytest.approx(8.0 / math.sqrt(38.0 * 2.0)),  # sums of (-3, -2, 5) and (-1, 0, 1)
        "spearman": pytest.approx(1.0),
        "mse": pytest.approx(12.0),
    }
    assert regression_metrics((values * 0.0, labels)) == {"pearson": 0.0, "spearman": 0.0, "mse": pytest.approx(14 / 3)}


def test_texts() -> None:
    scores = rouge_metrics(["the cats sat on the mat", "dogs"], ["The cat sat on a mat.", "rain"])
    # Words 5 of 6 and 6, pairs 3 of 5 and 5, the longest run 5; of the second text nothing.
    assert scores == {
        "rouge1": pytest.approx(5 / 6 / 2),
        "rouge2": pytest.approx(3 / 5 / 2),
        "rougeL": pytest.approx(5 / 6 / 2),
    }


def test_every_number_counts_in_its_micro_batch() -> None:
    """-100 marks a token that no loss counts; as a number to be learnt it is one like others."""
    batches = [{"labels": torch.tensor([-100.0, 1.0])}, {"labels": torch.tensor([2.0, 3.0])}]
    assert micro_batch_weights(batches, shifted=False) == [1.0, 1.0]
    classes = [{"labels": torch.tensor([-100, 1])}, {"labels": torch.tensor([2, 3])}]
    assert micro_batch_weights(classes, shifted=False) == [pytest.approx(2 / 3), pytest.approx(4 / 3)]


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "gpt2_cls", "opt_350m"])
def test_a_model_has_as_many_positions_as_it_can_read(name: str) -> None:
    model = tiny_model(name)
    limit = positions(model)
    assert limit is not None
    model(input_ids=torch.full((1, limit), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, limit + 1), 5))


def test_relative_positions_have_no_end() -> None:
    assert positions(tiny_model("t5")) is None
    assert positions(tiny_model("deberta", position_biased_input=False)) is None
