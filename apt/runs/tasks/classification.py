"""Classification: a class for each sentence, or for each pair of them."""

import torch
from torch import Tensor, nn

from apt.runs.data import DataConfig, DatasetLoader, Loader
from apt.runs.evaluation.evaluate import Evaluator
from apt.runs.evaluation.metrics import classification_metrics
from apt.runs.tasks.task import DataRequest, Task


def load_classes(asked: DataRequest) -> Loader:
    """Sentences and their classes."""
    return DatasetLoader(asked.data, asked.tokenizer, asked.seed, num_labels=asked.num_labels)


def one_class_each(ids: Tensor, data: DataConfig) -> dict[str, Tensor]:
    """A class for each row."""
    return {"labels": torch.ones(len(ids), dtype=torch.long)}


def score_classes(evaluator: Evaluator, model: nn.Module, data: Loader) -> dict[str, float]:
    """How often the likeliest class is right."""
    return classification_metrics(evaluator.predict(model, data.test))


CLASSIFICATION = Task(
    metrics=("accuracy", "f1", "matthews"),
    head="AutoModelForSequenceClassification",
    hub_tag="text-classification",
    load=load_classes,
    targets=one_class_each,
    score=score_classes,
    counts_classes=True,
)
