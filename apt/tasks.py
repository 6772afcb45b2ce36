"""What a batch means: a task's data, model, tokenizer and names of metrics, and the Trainer's arguments."""

import importlib.util
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GgufConfig,
    TrainingArguments,
)

from apt.config import TASKS, HardwareConfig, RunConfig, TrainingSettings
from apt.data import DatasetLoader, InstructionLoader, Loader, PairLoader, QuestionLoader, TextLoader, resolve_model
from apt.data.sources import GGUF
from apt.moments import OPTIMIZERS

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
    """The pretrained model in float32 on the CPU: a language model with its own head, else one with a new head.

    A new head is drawn with `training.seed`.

    Raises:
        ValueError: the model cannot be loaded.
        ImportError: it lies in a package that is not installed.
    """
    if config.model.task in OF_TOKENS:
        model = _load(AutoModelForCausalLM, config.model.name, dtype=torch.float32)
        assert isinstance(model, nn.Module)
        return model
    if config.model.task == "summarization":
        model = _load(AutoModelForSeq2SeqLM, config.model.name, dtype=torch.float32)
        assert isinstance(model, nn.Module)
        return model
    labels: dict[str, Any] = {"num_labels": num_labels}
    if config.model.task == "regression":
        labels["problem_type"] = "regression"
    if label_names is not None and len(label_names) == num_labels:
        labels = {"id2label": dict(enumerate(label_names)), "label2id": {n: i for i, n in enumerate(label_names)}}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.training.seed)
        asks = config.model.task == "question_answering"
        kind, labels = (AutoModelForQuestionAnswering, {}) if asks else (AutoModelForSequenceClassification, labels)
        model = _load(kind, config.model.name, dtype=torch.float32, **labels)
    # A decoder reads its class at the last token that is not padding, so it has to know which one that is.
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    assert isinstance(model, nn.Module)
    return model


def check_shape(config: RunConfig, model: nn.Module) -> None:
    """Raise ValueError where `model.shape`, by which a run was planned, is not that of the model."""
    loaded: Any = model.config
    for name, value in (config.model.shape or {}).items():
        if (found := getattr(loaded, name, None)) != value:
            raise ValueError(
                f"model: {config.model.name} has {name}={found!r}, but model.shape says {value!r}; correct it, or "
                f"leave model.shape out"
            )


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


def check_lengths(data: Loader, model: nn.Module) -> None:
    """Raise ValueError where a row of the data has more tokens than the model has positions."""
    most, limit = (
        max(len(ids) for part in (data.train, data.test) for ids in part.columns["input_ids"]),
        positions(model),
    )
    if limit is not None and most > limit:
        raise ValueError(
            f"data: a sequence of {most} tokens is longer than the {limit} positions of the model; set "
            f"{data.length_setting} to at most {limit}"
        )


def positions(model: nn.Module) -> int | None:
    """How many tokens of a sequence a model has positions for; None where they are relative and any number goes."""
    for name, module in model.named_modules():
        # RoBERTa and its like count positions from behind the number of the padding token.
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.num_embeddings - module.padding_idx - 1
    config: Any = model.config
    if hasattr(config, "relative_attention_num_buckets") or not getattr(config, "position_biased_input", True):
        return None  # T5; DeBERTa v2 and v3
    limit: int | None = getattr(config, "max_position_embeddings", None)
    return limit


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


def _reporters(names: list[str]) -> list[str]:
    """They are installed, or a ValueError says what is missing."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"config: training.report_to names {missing[0]}, which is not installed: pip install {missing[0]}"
        )
    return names or ["none"]


def training_arguments(config: RunConfig, folder: Path) -> TrainingArguments:
    """The Trainer's arguments; `folder` gets its checkpoints."""
    training, hardware = config.training, config.hardware
    on_cpu = choose_device(hardware).type == "cpu"
    by_length = config.data.group_by_length and config.model.task != "language_modeling"  # blocks are of one length
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
        report_to=_reporters(training.report_to or []),
        remove_unused_columns=False,
        disable_tqdm=False,
        use_cpu=on_cpu,
        bf16=hardware.precision == "bf16",
        fp16=hardware.precision == "fp16",
        dataloader_num_workers=0,
        dataloader_pin_memory=not on_cpu,
    )
