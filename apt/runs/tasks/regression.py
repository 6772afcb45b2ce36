"""Regression: a number for each sentence, or for each pair of them."""

import torch
from torch import Tensor, nn

from apt.runs.data import DataConfig, DatasetLoader, Loader
from apt.runs.evaluation.evaluate import Evaluator
from apt.runs.evaluation.metrics import regression_metrics
from apt.runs.tasks.task import DataRequest, Task


def load_numbers(asked: DataRequest) -> Loader:
    """Sentences and their numbers."""
    return DatasetLoader(asked.data, asked.tokenizer, asked.seed, regression=True)


def one_number_each(ids: Tensor, data: DataConfig) -> dict[str, Tensor]:
    """A number for each row."""
    return {"labels": torch.ones(len(ids), dtype=torch.float)}


def score_numbers(evaluator: Evaluator, model: nn.Module, data: Loader) -> dict[str, float]:
    """How well the outputs go along with the numbers."""
    return regression_metrics(evaluator.predict(model, data.test))


REGRESSION = Task(
    metrics=("pearson", "spearman", "mse"),
    head="AutoModelForSequenceClassification",
    hub_tag="text-classification",
    load=load_numbers,
    targets=one_number_each,
    score=score_numbers,
    head_settings={"num_labels": 1, "problem_type": "regression"},
)
