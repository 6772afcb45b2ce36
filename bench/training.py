"""Training runs that are measured: their time, their memory, and how accuracy comes while they train."""

import copy
import os
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

from peft import LoraConfig, get_peft_model
from transformers import DataCollatorWithPadding, Trainer, TrainerCallback

import apt
from apt.families import anatomy_of
from apt.pruning.units import block_params
from apt.runs.arguments import training_arguments
from apt.runs.config import RunConfig
from apt.runs.data import Examples
from apt.runs.evaluation.evaluate import Evaluator
from apt.runs.evaluation.metrics import classification_metrics
from bench.memory import PeakMemory

SENTENCES = 1000  # of the test set, scored at each point of a course


class Course(TrainerCallback):
    """Accuracy on the first test sentences at evenly spaced steps; the time it takes is kept apart from training.

    Args:
        evaluator: scores the model.
        test: the sentences.
        points: measurements from the first step to the last; 0 measures nothing.
        total: block parameters of the unpruned model, which sparsity is a fraction of.
    """

    def __init__(self, evaluator: Evaluator, test: Examples, points: int, total: int) -> None:
        chosen = {name: column[:SENTENCES] for name, column in test.columns.items()}
        self.evaluator, self.test, self.points, self.total = evaluator, Examples(chosen), points, total
        self.seconds = self.cpu_seconds = 0.0  # spent here
        self.started = self.cpu_started = 0.0
        self.found: list[tuple[float, float, float]] = []  # seconds of training, accuracy, sparsity

    def start(self) -> None:
        """Training, or what belongs to it, begins now."""
        self.started, self.cpu_started = time.perf_counter(), time.process_time()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps = {round(point * state.max_steps / self.points) for point in range(1, self.points)}

    # Not at a step's end: an event of that step may still be to come.
    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step in self.steps:
            self._measure(model)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.points:
            self._measure(model)

    def training_seconds(self) -> tuple[float, float]:
        """Wall and CPU seconds since the start, without those spent here."""
        wall, cpu = time.perf_counter() - self.started, time.process_time() - self.cpu_started
        return wall - self.seconds, cpu - self.cpu_seconds

    def _measure(self, model: Any) -> None:
        wall, cpu = self.training_seconds()
        accuracy = classification_metrics(self.evaluator.predict(model, self.test))["accuracy"]
        self.found.append((wall, accuracy, 1.0 - block_parameters(model) / self.total))
        after = self.training_seconds()
        self.seconds += after[0] - wall
        self.cpu_seconds += after[1] - cpu

    def column(self, before: float = 0.0) -> str:
        """``seconds:accuracy:sparsity`` of each point, `before` seconds of earlier training added."""
        return " ".join(f"{wall + before:.1f}:{accuracy:.4f}:{sparsity:.4f}" for wall, accuracy, sparsity in self.found)


def block_parameters(model: Any) -> int:
    """Weights of attention, FFN and norms inside the layers, adapters excluded, of a plain, patched or PEFT model."""
    peft = hasattr(model, "get_base_model")
    plain = model.get_base_model() if peft else model
    adapters = sum(p.numel() for name, p in plain.named_parameters() if ".lora_" in name) if peft else 0
    return block_params(anatomy_of(plain)) - adapters


def make_trainer(
    model: Any,
    config: RunConfig,
    data: Any,
    tokenizer: Any,
    folder: Path,
    callback: TrainerCallback,
    ours: bool = False,
) -> Any:
    """An `apt.APTrainer` (`ours`) or a plain `Trainer` on a config's training data; `folder` gets its checkpoints."""
    common: dict[str, Any] = {"args": training_arguments(config, folder), "train_dataset": data.train}
    common |= {"data_collator": DataCollatorWithPadding(tokenizer), "callbacks": [callback]}
    return apt.APTrainer(model=model, **common) if ours else Trainer(model=model, **common)


def train(
    model: Any, config: RunConfig, data: Any, tokenizer: Any, course: Course, ours: bool = False
) -> tuple[Any, dict[str, Any]]:
    """Train with `make_trainer`; the trainer, and what that cost as columns."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(model, config, data, tokenizer, Path(folder), course, ours)
        row: dict[str, Any] = {"trainable_start": sum(p.numel() for p in model.parameters() if p.requires_grad)}
        with PeakMemory() as peak:
            if not course.started:
                course.start()
            trainer.train()
            wall, cpu = course.training_seconds()
    row |= {"train_seconds": round(wall, 2), "train_cpu_seconds": round(cpu, 2), "steps": trainer.state.global_step}
    return trainer, row | {"peak_mb": round(peak.mb, 1)}


def peft_lora(model: Any, config: RunConfig) -> Any:
    """PEFT's LoRA on the modules that the config's targets name, with the same rank and scale.

    A twin tells their names, as PEFT knows no roles. Its adapters are drawn first: the rows depend on that.
    """
    with mock.patch.dict(os.environ):  # what patching sets for oneDNN is not to reach the baseline
        twin = apt.patch_model(copy.deepcopy(model), config.apt_config(), method="lora")
    ends = ("pooler", "classifier", "score")
    trained = [end for end in ends if any(name.endswith(end) for name, _ in model.named_modules())]
    return get_peft_model(
        model,
        LoraConfig(
            r=config.training.initial_rank,
            lora_alpha=config.training.initial_rank * config.training.scaling_factor,
            target_modules=list(apt.summary(twin).ranks),
            modules_to_save=trained,
        ),
    )
