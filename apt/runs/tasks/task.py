"""What a task is: its data, its head, what is right of a batch, and how good a model is at it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from apt.runs.data import DataConfig, Loader
from apt.runs.evaluation import EvaluationConfig
from apt.runs.evaluation.evaluate import Evaluator


@dataclass(frozen=True, kw_only=True)
class DataRequest:
    """What a run asks of the data of its task."""

    data: DataConfig
    evaluation: EvaluationConfig
    tokenizer: Any  # of the model
    seed: int  # draws the rows where fewer are asked for than there are
    num_labels: int | None  # classes; None: as many as the data has


@dataclass(frozen=True, kw_only=True)
class Task:
    """What sets a task apart from the others.

    Args:
        metrics: what it is scored by, the one that a report shows in front first.
        head: class of transformers that has its head.
        hub_tag: its name on the hub, for the model card.
        load: reads its data.
        targets: what is right of token ids ``[B, T]``, as inputs of the model; an estimate asks for their shapes alone.
        score: every metric on `Loader.test`, and what else was counted on the way; the model is in evaluation mode.
        new_head: whether the head is drawn with `training.seed`; else it comes with the model.
        head_settings: of the model's configuration, where they are the same for all data.
        counts_classes: whether `model.num_labels` may say how many classes there are.
        packed: whether rows are blocks of `data.block_length` tokens; else they are as long as their text.
        writes: whether models generate text, whose speed is measured too.
    """

    metrics: tuple[str, ...]
    head: str
    hub_tag: str
    load: Callable[[DataRequest], Loader]
    targets: Callable[[Tensor, DataConfig], dict[str, Tensor]]
    score: Callable[[Evaluator, nn.Module, Loader], dict[str, float]]
    new_head: bool = True
    head_settings: Mapping[str, Any] = field(default_factory=dict)
    counts_classes: bool = False
    packed: bool = False
    writes: bool = False
