"""What a batch means: a task's data, model, tokenizer and metrics, and the Trainer's arguments."""

import importlib.util
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GgufConfig,
    TrainingArguments,
)

from apt.config import HardwareConfig, RunConfig, TrainingSettings
from apt.data import DatasetLoader, TextLoader, resolve_model
from apt.data.sources import GGUF
from apt.moments import OPTIMIZERS

METRIC_OF = {"classification": "accuracy", "language_modeling": "perplexity"}  # the one that a report shows first


def load_data(config: RunConfig, tokenizer: Any, *, num_labels: int | None = None) -> DatasetLoader | TextLoader:
    """The data of a run, as its task reads it; `num_labels` classes, or as many as `config` or the data says."""
    if config.model.task == "language_modeling":
        return TextLoader(config.data, tokenizer, config.training.seed)
    return DatasetLoader(config.data, tokenizer, config.training.seed, num_labels=num_labels or config.model.num_labels)


def build_tokenizer(config: RunConfig) -> Any:
    """The tokenizer of the model; where it has no padding token, the end-of-text token pads.

    Raises:
        ValueError: it cannot be loaded, or has neither token.
        ImportError: it lies in a package that is not installed.
    """
    tokenizer = _load(AutoTokenizer, config.model.name)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ValueError(f"model: the tokenizer of {config.model.name} has no padding and no end-of-text token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def build_model(
    config: RunConfig, num_labels: int | None, tokenizer: Any, label_names: list[str] | None = None
) -> nn.Module:
    """The pretrained model in float32 on the CPU: a language model with its own head, or a classifier with a new one.

    A new head is drawn with `training.seed`.

    Raises:
        ValueError: the model cannot be loaded.
        ImportError: it lies in a package that is not installed.
    """
    if config.model.task == "language_modeling":
        model = _load(AutoModelForCausalLM, config.model.name, dtype=torch.float32)
        assert isinstance(model, nn.Module)
        return model
    labels: dict[str, Any] = {"num_labels": num_labels}
    if label_names is not None and len(label_names) == num_labels:
        labels = {"id2label": dict(enumerate(label_names)), "label2id": {n: i for i, n in enumerate(label_names)}}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.training.seed)
        model = _load(AutoModelForSequenceClassification, config.model.name, dtype=torch.float32, **labels)
    # A decoder reads its class at the last token that is not padding, so it has to know which one that is.
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    assert isinstance(model, nn.Module)
    return model


def _load(kind: Any, name: str, **settings: Any) -> Any:
    path, broken = resolve_model(name), [OSError, SafetensorError]
    if path.endswith(GGUF):
        broken += [ValueError, LookupError, struct.error]
        path, _, settings["gguf_file"] = path.rpartition("/")
        if importlib.util.find_spec("gguf") is None:
            raise ImportError(f'model: reading {name} needs gguf; pip install "apt-lm[gguf]"')
        if kind is not AutoTokenizer:  # without dequantize the model is dense and yet marked as quantized
            settings["quantization_config"] = GgufConfig(dequantize=True)
    try:
        return kind.from_pretrained(path or ".", **settings)
    except FileNotFoundError:
        raise
    except tuple(broken) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"model: {name} cannot be loaded: {reason}") from None


def compute_metrics(prediction: Iterable[Any]) -> dict[str, float]:
    """Accuracy of a classifier in [0, 1], and with two classes F1 of class 1 (0 where there is neither it nor a guess).

    Args:
        prediction: logits ``[N, C]`` and labels ``[N]``, as arrays; a Trainer's `EvalPrediction` is such a pair.
    """
    logits, labels = prediction
    classes = np.asarray(logits).argmax(axis=-1)
    metrics = {"accuracy": float((classes == labels).mean())}
    if np.shape(logits)[-1] == 2:
        hits = int(((classes == 1) & (labels == 1)).sum())
        claimed = int((classes == 1).sum() + (labels == 1).sum())
        metrics["f1"] = 2.0 * hits / claimed if claimed else 0.0
    return metrics


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


def training_arguments(config: RunConfig, folder: Path) -> TrainingArguments:
    """The Trainer's arguments; `folder` gets its checkpoints."""
    training, hardware = config.training, config.hardware
    on_cpu = choose_device(hardware).type == "cpu"
    by_length = config.data.group_by_length and config.model.task == "classification"  # blocks are of one length
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
        report_to="none",
        remove_unused_columns=False,
        disable_tqdm=False,
        use_cpu=on_cpu,
        bf16=hardware.precision == "bf16",
        fp16=hardware.precision == "fp16",
        dataloader_num_workers=0,
        dataloader_pin_memory=not on_cpu,
    )
