"""What a task means: its data, and the names of its metrics."""

from typing import Any

from apt.runs.config import TASKS, RunConfig
from apt.runs.data import DatasetLoader, InstructionLoader, Loader, PairLoader, QuestionLoader, TextLoader

GLUE_METRICS = {"cola": "matthews", "mrpc": "f1", "qqp": "f1"}  # what GLUE's page shows, where it is not accuracy
OF_TOKENS = ("language_modeling", "instruction_following")  # a decoder with its own head
GENERATING = (*OF_TOKENS, "summarization")


def metric_names(config: RunConfig) -> list[str]:
    """What a run is scored by, what a report shows first in front: as asked, as GLUE does it, or all of the task."""
    if config.evaluation.metrics is not None:
        return config.evaluation.metrics
    names = TASKS[config.model.task]
    first = GLUE_METRICS.get(config.data.datasets.rpartition("/")[2].lower())
    return [first, *(name for name in names if name != first)] if first in names else list(names)


def chosen_scores(config: RunConfig, scores: dict[str, float]) -> dict[str, float]:
    """The scores asked for, in their order, and whatever else was counted on the way."""
    names = metric_names(config)
    others = {name: value for name, value in scores.items() if name not in TASKS[config.model.task]}
    return {name: scores[name] for name in names} | others


def load_data(config: RunConfig, tokenizer: Any, *, num_labels: int | None = None) -> Loader:
    """The data of a run, as its task reads it; `num_labels` classes, or as many as `config` or the data says."""
    if config.model.task == "language_modeling":
        return TextLoader(config.data, tokenizer, config.training.seed)
    if config.model.task == "question_answering":
        hold_out = config.evaluation.no_answer_threshold is None
        return QuestionLoader(config.data, tokenizer, config.training.seed, hold_out=hold_out)
    if config.model.task == "summarization":
        return PairLoader(config.data, tokenizer, config.training.seed)
    if config.model.task == "instruction_following":
        return InstructionLoader(config.data, tokenizer, config.training.seed)
    regression = config.model.task == "regression"
    classes = num_labels or config.model.num_labels
    return DatasetLoader(config.data, tokenizer, config.training.seed, num_labels=classes, regression=regression)
