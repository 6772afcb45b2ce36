"""The settings of a whole run, composed of the rooms' own: one frozen dataclass a section, unit and range at each."""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import yaml

from apt.apt_config import APTConfig, changes_of
from apt.distillation import DistillationConfig
from apt.methods import METHODS, MethodConfig
from apt.methods.prompts import PromptConfig
from apt.pruning import PruningConfig
from apt.pruning.ranks import TuningConfig
from apt.surgery.moments import OPTIMIZERS

TASKS = {  # and what each is scored by, the one that a report shows first in front
    "classification": ("accuracy", "f1", "matthews"),
    "regression": ("pearson", "spearman", "mse"),
    "language_modeling": ("perplexity",),
    "instruction_following": ("perplexity",),
    "summarization": ("rouge1", "rouge2", "rougeL"),
    "question_answering": ("f1", "exact_match"),
}
PRECISIONS = ("fp32", "bf16", "fp16")
REPORTERS = ("tensorboard", "wandb", "trackio")
DEVICES = ("auto", "cpu", "cuda")


def _at_least(section: str, config: Any, bounds: Mapping[str, float]) -> None:
    """Raise ValueError for the first field that is below its bound; None passes."""
    for name, low in bounds.items():
        value = getattr(config, name)
        if value is not None and value < low:
            raise ValueError(f"config: {section}.{name} must be at least {low}, got {value}")


def _one_of(key: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise ValueError(f"config: {key} must be one of {list(known)}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model, and how it is adapted."""

    name: str  # on the hub, a local folder, a .gguf file, or package:NAME/path
    # "classification" of sentences, "regression": a number for each, "language_modeling" of plain text,
    # "instruction_following": a language model on instructions, whose responses alone it learns,
    # "summarization": an encoder-decoder writes a text of a text, a translation too,
    # "question_answering": the answer stands in a context, or nowhere (SQuAD v2)
    task: str = "classification"
    # "lora", "adalora", "adalora_simple", "gsa", "spectral_a", "spectral_r", "dynacsg": adapters alone, unless prune
    # says otherwise; "p_tuning", "prefix_tuning": a prompt; "full": everything trains, the baseline
    method: str = "apt"
    prune: bool | None = None  # whether units go; null: as the method does it
    # names, endings of names, or roles (q, v, up, ...); one text: a regular expression or "all-linear"; null: defaults
    target_modules: list[str] | str | None = None
    num_labels: int | None = None  # classes, at least 2; null: as many as the data has
    # its stock configuration (model_type, sizes), by which --dry-run builds it on no device and without a download;
    # training says where the model is another; null: read from the model
    shape: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        _one_of("model.method", self.method, METHODS)
        _one_of("model.task", self.task, TASKS)
        _at_least("model", self, {"num_labels": 2})
        if self.task != "classification" and self.num_labels is not None:
            raise ValueError(f"config: model.num_labels counts classes, but model.task is {self.task!r}; leave it out")
        if self.shape is not None and "model_type" not in self.shape:
            raise ValueError(f"config: model.shape must name the model_type beside the sizes, got {self.shape}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which sentences, which of their columns, and how many."""

    datasets: str  # on the hub (glue/sst2), a csv, tsv, jsonl, parquet or txt file, a folder of them, package:NAME/path
    text_columns: list[str] | None = None  # one, or two for sentence pairs; null: found by their names
    label_column: str = "label"  # holds the labels
    target_column: str | None = None  # with what a model is to say; null: found by its name
    filter: dict[str, Any] | None = None  # column: value; only rows with all of these values are read
    drop_duplicates: bool = False  # of a text only the first row stays
    test_size: int | None = None  # sentences, documents, at least 1; held out where the data has no test split
    split_seed: int = 0  # of that split and of max_test_samples; training.seed does not change them
    max_length: int = 128  # tokens, at least 2; longer sentences are cut
    doc_stride: int | None = (
        None  # tokens, at least 0, that two windows of a long context share; null: a third of max_length
    )
    max_target_length: int = 128  # tokens, at least 2, of what is to be written; longer is cut, and never generated
    source_prefix: str = ""  # goes before each text to be summarised or translated: "summarize: " for T5
    block_length: int = 256  # tokens, at least 2; documents of plain text are packed into blocks of so many
    train_size: int | None = None  # examples to train on, at least 1, for --dry-run, which does not read them
    max_train_samples: int | None = None  # sentences, documents, at least 1; null: all
    max_test_samples: int | None = None  # sentences, documents, at least 1; null: all
    cache: str | None = "auto"  # folder for the tokens of large data; "auto": in the user's cache; null: none are kept
    group_by_length: bool = True  # batches of sentences of like length, so that less of them is padding

    def __post_init__(self) -> None:
        sizes = {
            "test_size": 1,
            "train_size": 1,
            "max_length": 2,
            "max_target_length": 2,
            "doc_stride": 0,
            "block_length": 2,
            "max_train_samples": 1,
            "max_test_samples": 1,
            "split_seed": 0,
        }
        _at_least("data", self, sizes)
        if self.text_columns is not None and not 1 <= len(self.text_columns) <= 2:
            raise ValueError(f"config: data.text_columns must name one or two columns, got {self.text_columns}")


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """The adapters at the start, and the optimization."""

    initial_rank: int = 8  # of every adapter, at least 1
    scaling_factor: float = 2.0  # unitless, s in W + s B A (LoRA's alpha / r)
    momentum_salience: float = 0.85  # of the moving averages of salience and importance, [0, 1)
    learning_rate: float = 2e-4  # peak, at least 0
    epochs: float = 3.0  # passes over the training data, above 0
    max_steps: int = -1  # optimizer steps, at least 1; -1: as epochs says
    batch_size: int = 32  # sentences, blocks of one forward pass, at least 1
    gradient_accumulation_steps: int = 1  # batches of one optimizer step, at least 1
    optimizer: str = "adamw"  # of torch: "adamw", "adam", "sgd", "nadam", ...; its moments follow every event
    weight_decay: float = 0.0  # of the optimizer, at least 0
    max_grad_norm: float = 1.0  # gradients are clipped to it; 0: never
    warmup_ratio: float = 0.06  # fraction of the steps in which the learning rate rises, [0, 1)
    lr_schedule: str = "linear"  # any scheduler of transformers: linear, cosine, constant_with_warmup, ...
    save_steps: int = 0  # optimizer steps between checkpoints for --resume, gone once the run is done; 0: none
    logging_steps: int = 10  # optimizer steps between two losses on the progress bar, at least 1
    report_to: list[str] | None = None  # where losses and events go as well: "tensorboard", "wandb", "trackio"
    seed: int = 0  # of the new head, the adapters, dropout and the order of batches

    def __post_init__(self) -> None:
        ones = ("initial_rank", "batch_size", "gradient_accumulation_steps", "logging_steps")
        zeros = ("learning_rate", "weight_decay", "max_grad_norm", "warmup_ratio", "save_steps", "seed")
        _one_of("training.optimizer", self.optimizer, OPTIMIZERS)
        for name in self.report_to or ():
            _one_of("training.report_to", name, REPORTERS)
        _at_least("training", self, dict.fromkeys(ones, 1) | dict.fromkeys(zeros, 0))
        if not 0.0 <= self.momentum_salience < 1.0 or not self.warmup_ratio < 1.0:
            raise ValueError(
                f"config: training.momentum_salience and training.warmup_ratio must be in [0, 1), got "
                f"{self.momentum_salience} and {self.warmup_ratio}"
            )
        if self.epochs <= 0.0 or (self.max_steps < 1 and self.max_steps != -1):
            raise ValueError(
                f"config: training.epochs must be above 0 and training.max_steps at least 1 or -1 for all epochs, got "
                f"{self.epochs} and {self.max_steps}"
            )


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is measured at the end."""

    metrics: list[str] | None = None  # of the task's, the one a report shows first in front; null: all of the task
    inference_batch_size: int = 32  # sentences, blocks, at least 1; of the latency and of the scores
    inference_length: int = 64  # tokens of each sentence in the latency, at least 1
    no_answer_threshold: float | None = None  # logits above the best span; null: chosen on training questions held out
    max_answer_length: int = 30  # tokens, at least 1
    num_beams: int = 1  # of the texts that are scored by ROUGE, at least 1; 1 is greedy
    generated_tokens: int = 32  # of each prompt in the timing of generation (language models), at least 2
    inference_repeats: int = 20  # forward passes of each model, of which the median is the latency, at least 1
    score_steps: int = 0  # optimizer steps between two test scores on the way, which choose nothing; 0: none
    event_timing_steps: int = 10  # forward and backward passes before and after each event; 0: events are not timed

    def __post_init__(self) -> None:
        ones = ("inference_batch_size", "inference_length", "inference_repeats", "num_beams", "max_answer_length")
        _at_least(
            "evaluation",
            self,
            dict.fromkeys(ones, 1) | {"event_timing_steps": 0, "score_steps": 0, "generated_tokens": 2},
        )
        if self.metrics == []:
            raise ValueError("config: evaluation.metrics must name a metric at least; null is all of the task")


@dataclass(frozen=True, kw_only=True)
class HardwareConfig:
    """Where and in which arithmetic."""

    precision: str = "fp32"  # "fp32", "bf16" or "fp16", of the arithmetic of training; weights are kept in float32
    num_threads: int | None = None  # of the CPU, at least 1; null: torch's choice
    device: str = "auto"  # "auto": a GPU where there is one; "cpu"; "cuda"

    def __post_init__(self) -> None:
        _one_of("hardware.precision", self.precision, PRECISIONS)
        _one_of("hardware.device", self.device, DEVICES)
        _at_least("hardware", self, {"num_threads": 1})


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All settings of a run; the YAML has one section a field."""

    output_dir: str  # made by the run; it holds the model, the metrics and the events
    ablation: str = "full"  # a part of the method left out, as `ABLATIONS` says; its settings show below
    model: ModelConfig
    data: DataConfig
    training: TrainingSettings = field(default_factory=TrainingSettings)
    pruning: PruningConfig = field(default_factory=PruningConfig)
    adapter: MethodConfig = field(default_factory=MethodConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    tuning: TuningConfig = field(default_factory=TuningConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)

    def __post_init__(self) -> None:
        for name in self.evaluation.metrics or ():
            _one_of(f"evaluation.metrics, with model.task={self.model.task},", name, TASKS[self.model.task])
        for section, leaves in changes_of(self.ablation, self.pruning, self.tuning).items():
            object.__setattr__(self, section, dataclasses.replace(getattr(self, section), **leaves))

    def apt_config(self) -> APTConfig:
        """The settings of the method alone, for `patch_model` and the controller."""
        targets = self.model.target_modules
        return APTConfig(
            method=self.model.method,
            prune=self.model.prune,
            adapter=self.adapter,
            prompt=self.prompt,
            rank=self.training.initial_rank,
            scale=self.training.scaling_factor,
            target_modules=tuple(targets) if isinstance(targets, list) else targets,
            momentum_salience=self.training.momentum_salience,
            ablation=self.ablation,
            pruning=self.pruning,
            tuning=self.tuning,
            distillation=self.distillation,
        )

    def to_yaml(self) -> str:
        """Every setting, defaults included, as `load_config` reads it."""
        return yaml.safe_dump(asdict(self), sort_keys=False)
