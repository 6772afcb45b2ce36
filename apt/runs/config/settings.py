"""The settings of a whole run, composed of the rooms' own: one frozen dataclass a section, unit and range at each."""

import dataclasses
from dataclasses import asdict, dataclass, field
from typing import Any

import yaml

from apt.apt_config import APTConfig, changes_of
from apt.distillation import DistillationConfig
from apt.families.config_files import check_sizes
from apt.files.reading import shown
from apt.methods import METHODS, MethodConfig
from apt.methods.prompts import PromptConfig
from apt.pruning import PruningConfig
from apt.pruning.ranks import TuningConfig
from apt.runs.checks import check_at_least, check_one_of
from apt.runs.data import DataConfig
from apt.runs.evaluation import EvaluationConfig
from apt.runs.tasks import TASKS
from apt.surgery.moments import OPTIMIZERS

PRECISIONS = ("fp32", "bf16", "fp16")
REPORTERS = ("tensorboard", "wandb", "trackio")
DEVICES = ("auto", "cpu", "cuda")


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
        check_one_of("model.method", self.method, METHODS)
        check_one_of("model.task", self.task, TASKS)
        check_at_least("model", self, {"num_labels": 2})
        if self.num_labels is not None and not TASKS[self.task].counts_classes:
            raise ValueError(f"config: model.num_labels counts classes, but model.task is {self.task!r}; leave it out")
        if self.shape is not None:
            check_sizes(self.shape, "config: model.shape")
        if self.shape is not None and "model_type" not in self.shape:
            raise ValueError(f"config: model.shape must name the model_type beside the sizes, got {shown(self.shape)}")


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
        check_one_of("training.optimizer", self.optimizer, OPTIMIZERS)
        for name in self.report_to or ():
            check_one_of("training.report_to", name, REPORTERS)
        check_at_least("training", self, dict.fromkeys(ones, 1) | dict.fromkeys(zeros, 0))
        if self.scaling_factor == 0.0:
            raise ValueError("config: training.scaling_factor must not be 0, as no adapter would learn anything")
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
class HardwareConfig:
    """Where and in which arithmetic."""

    precision: str = "fp32"  # "fp32", "bf16" or "fp16", of the arithmetic of training; weights are kept in float32
    num_threads: int | None = None  # of the CPU, at least 1; null: torch's choice
    device: str = "auto"  # "auto": a GPU where there is one; "cpu"; "cuda"

    def __post_init__(self) -> None:
        check_one_of("hardware.precision", self.precision, PRECISIONS)
        check_one_of("hardware.device", self.device, DEVICES)
        check_at_least("hardware", self, {"num_threads": 1})


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
        task = TASKS[self.model.task]
        for name in self.evaluation.metrics or ():
            check_one_of(f"evaluation.metrics, with model.task={self.model.task},", name, task.metrics)
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
