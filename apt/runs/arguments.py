"""The device, the optimizer and the Trainer's arguments of a run."""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from apt.runs.config import HardwareConfig, RunConfig, TrainingSettings
from apt.runs.tasks import TASKS
from apt.surgery.moments import OPTIMIZERS


def choose_device(hardware: HardwareConfig) -> torch.device:
    """The device of a run. Raises ValueError where a GPU is asked for and there is none."""
    if hardware.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("hardware: device is 'cuda', but torch finds no GPU; use 'auto' or 'cpu'")
    wanted = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(wanted if hardware.device == "auto" else hardware.device)


def optimizer_class(training: TrainingSettings) -> tuple[type[torch.optim.Optimizer], dict[str, Any]] | None:
    """The optimizer of a run and its settings; None is the Trainer's own AdamW. The Trainer adds the weight decay."""
    if training.optimizer == "adamw":
        return None
    return OPTIMIZERS[training.optimizer], {"lr": training.learning_rate}


def _installed_reporters(names: list[str]) -> list[str]:
    """The names as the Trainer wants them. Raises ValueError for one that is not installed."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"config: training.report_to names {missing[0]}, which is not installed: pip install {missing[0]}"
        )
    return names or ["none"]


def training_arguments(config: RunConfig, folder: Path) -> TrainingArguments:
    """The Trainer's arguments; `folder` gets its checkpoints."""
    training = config.training
    hardware = config.hardware
    on_cpu = choose_device(hardware).type == "cpu"
    # Blocks are of one length already.
    by_length = config.data.group_by_length and not TASKS[config.model.task].packed
    return TrainingArguments(
        output_dir=str(folder),
        learning_rate=training.learning_rate,
        num_train_epochs=training.epochs,
        max_steps=training.max_steps,
        per_device_train_batch_size=training.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        warmup_steps=training.warmup_ratio,  # below 1 it is a fraction of all steps
        lr_scheduler_type=training.lr_schedule,
        train_sampling_strategy="group_by_length" if by_length else "random",
        seed=training.seed,
        data_seed=training.seed,
        logging_steps=training.logging_steps,
        save_strategy="steps" if training.save_steps else "no",
        save_steps=training.save_steps or 1,
        save_total_limit=1,
        eval_strategy="no",
        report_to=_installed_reporters(training.report_to or []),
        remove_unused_columns=False,
        disable_tqdm=False,
        use_cpu=on_cpu,
        bf16=hardware.precision == "bf16",
        fp16=hardware.precision == "fp16",
        dataloader_num_workers=0,
        dataloader_pin_memory=not on_cpu,
    )
