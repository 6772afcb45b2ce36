"""The model and the tokenizer of a run."""

import importlib.util
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoTokenizer, GgufConfig

from apt.export.files import CARD
from apt.families.config_files import check_gguf, check_model_folder, is_unusable, reason_of
from apt.families.locate import GGUF, resolve_model
from apt.runs.config import RunConfig
from apt.runs.data import Loader
from apt.runs.tasks import TASKS, Task


def build_tokenizer(config: RunConfig) -> Any:
    """The tokenizer of the model; where it has no padding token, the end-of-text token pads.

    Raises:
        ValueError: it cannot be loaded, or has neither token.
        ImportError: it lies in a package that is not installed.
    """
    tokenizer = _load_pretrained(AutoTokenizer, config.model.name)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ValueError(f"model: the tokenizer of {config.model.name} has no padding and no end-of-text token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def build_model(
    config: RunConfig,
    num_labels: int | None,
    tokenizer: Any,
    label_names: list[str] | None = None,
    *,
    tuned: bool = False,
) -> nn.Module:
    """The pretrained model in float32 on the CPU, with the head of its task; a new one is drawn with `training.seed`.

    Args:
        config: names the model and its task.
        num_labels: of the data.
        tokenizer: of the model.
        label_names: of the data.
        tuned: whether the head must come with the model, as nothing trains it.

    Raises:
        ValueError: the model cannot be loaded, or is not whole.
        ImportError: it lies in a package that is not installed.
    """
    task = TASKS[config.model.task]
    settings = _head_settings(task, num_labels, label_names)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.training.seed)
        model, told = _load_pretrained(
            getattr(transformers, task.head),
            config.model.name,
            dtype=torch.float32,
            output_loading_info=True,
            **settings,
        )
    assert isinstance(model, nn.Module)
    _check_whole(model, told["missing_keys"], config.model.name)
    for key in sorted(told["missing_keys"])[: int(tuned)]:
        raise ValueError(
            f"model: {config.model.name} lacks {key}, which would be drawn at random, and nothing trains it; give a "
            f"model that was tuned to {config.model.task}"
        )
    loaded: Any = model.config
    # A decoder reads its class at the last token that is not padding, so it has to know which one that is.
    if task.new_head and loaded.pad_token_id is None:
        loaded.pad_token_id = tokenizer.pad_token_id
    return model


def _check_whole(model: Any, missing: Iterable[str], name: str) -> None:
    """Raise ValueError where a file lacks a weight of a layer or of the tokens, which would be drawn at random.

    Heads and poolers are drawn where the task is new to a model; they are in no numbered layer.
    """
    tokens = {key for key, module in model.named_modules() if module is model.get_input_embeddings()}
    for key in sorted(missing):
        if re.search(r"\.\d+\.", key) or key.rpartition(".")[0] in tokens:
            raise ValueError(f"model: {name} lacks {key}, which would be drawn at random; copy or convert it again")


def _head_settings(task: Task, num_labels: int | None, label_names: list[str] | None) -> dict[str, Any]:
    """What the configuration of a model is told of its head."""
    if label_names is not None and len(label_names) == num_labels:
        numbers = {name: number for number, name in enumerate(label_names)}
        return {**task.head_settings, "id2label": dict(enumerate(label_names)), "label2id": numbers}
    if num_labels is not None:
        return {**task.head_settings, "num_labels": num_labels}
    return dict(task.head_settings)


def check_shape(config: RunConfig, model: nn.Module) -> None:
    """Raise ValueError where `model.shape`, by which a run was planned, is not that of the model."""
    loaded: Any = model.config
    for name, value in (config.model.shape or {}).items():
        if (found := getattr(loaded, name, None)) != value:
            raise ValueError(
                f"model: {config.model.name} has {name}={found!r}, but model.shape says {value!r}; correct it, or "
                f"leave model.shape out"
            )


def _load_pretrained(kind: Any, name: str, **settings: Any) -> Any:
    path = resolve_model(name)
    if Path(path).is_dir():
        check_model_folder(Path(path), "model")
    if path.endswith(GGUF):
        if importlib.util.find_spec("gguf") is None:
            raise ImportError(f'model: reading {name} needs gguf; pip install "apt-lm[gguf]"')
        check_gguf(Path(path), "model")
        path, _, settings["gguf_file"] = path.rpartition("/")
        # Without dequantize a model is dense and yet marked as quantized.
        if kind is not AutoTokenizer:
            settings["quantization_config"] = GgufConfig(dequantize=True)
    try:
        return kind.from_pretrained(path or ".", **settings)
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever the files say; what is no fault of theirs passes
        if not is_unusable(error):
            raise
        if (Path(path) / CARD).is_file():
            raise ValueError(
                f"model: {name} is an export of apt-lm with sizes of its own; give the model that it was made from"
            ) from error
        raise ValueError(f"model: {name} cannot be loaded: {reason_of(error)}") from error


def check_lengths(data: Loader, model: nn.Module) -> None:
    """Raise ValueError where a row of the data is too long for the model, or has a token it does not know."""
    rows = [*data.train.columns["input_ids"], *data.test.columns["input_ids"]]
    find: Any = model.get_input_embeddings
    known = find().weight.shape[0]
    highest = max((max(row, default=0) for row in rows), default=0)
    if highest >= known:
        raise ValueError(
            f"data: the tokenizer makes token {highest}, but the model embeds {known} tokens; put the model's own "
            f"tokenizer beside it, or save the model after model.resize_token_embeddings"
        )
    most = max(map(len, rows))
    limit = positions(model)
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
