"""What the configuration of a model may say: sizes that a model can have, before one is built from them."""

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from apt.files.reading import UnreadableError, check_folder, check_regular, read_json_table, shown

# Entries that are sizes, and the largest that any model comes near: a larger one would fill the memory, or never end.
SIZES = {
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_decoder_layers"), 1_000),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "n_heads", "num_key_value_heads"), 10_000),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "head_dim", "d_kv"), 1_000_000),
    **dict.fromkeys(("intermediate_size", "d_ff", "n_inner", "hidden_dim", "ffn_dim"), 10_000_000),
    **dict.fromkeys(("vocab_size", "max_position_embeddings", "n_positions", "type_vocab_size"), 100_000_000),
}
# What transformers and torch raise for a configuration or weights that mean nothing; none of it is a fault of ours.
UNUSABLE = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, SafetensorError),
    *(AssertionError, MemoryError, struct.error, yaml.YAMLError, StrictDataclassError),
)


def check_sizes(config: Mapping[str, Any], place: str) -> None:
    """Raise UnreadableError for the first size that no model has, or else the first probability that is none.

    The message begins with `place`. A dropout is looked at by torch only when a layer runs, hours later maybe.
    """
    for name, most in SIZES.items():
        value = config.get(name)
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
            raise UnreadableError(f"{place}: {name} must be a whole number from 0 to {most:,}, got {shown(value)}")
    for name, value in config.items():
        if "drop" in str(name) and isinstance(value, int | float) and not 0 <= value <= 1:
            raise UnreadableError(f"{place}: {name} must be a number from 0 to 1, got {shown(value)}")


def check_model_folder(folder: Path, room: str) -> None:
    """Refuse a folder with a model of somebody before a library reads it: pipes, devices, sizes that no model has."""
    check_folder(folder, room)
    config = folder / "config.json"
    if config.exists():
        check_sizes(read_json_table(config, room), f"{room}: {config}")


def check_gguf(path: Path, room: str) -> None:
    """Refuse a GGUF file before a model of the sizes that it tells is built. It needs gguf."""
    from transformers import PreTrainedConfig

    check_regular(path, room)
    try:
        told, _ = PreTrainedConfig.get_config_dict(path.parent, gguf_file=path.name)
    except Exception as error:  # whatever the file says; what is no fault of it passes
        if not is_unusable(error):
            raise
        raise UnreadableError(f"{room}: {path} cannot be loaded: {reason_of(error)}") from error
    check_sizes(told, f"{room}: {path}")


def is_unusable(error: BaseException) -> bool:
    """Whether an error says that files are not what they must be; tokenizers raises `Exception` itself."""
    return isinstance(error, UNUSABLE) or type(error) is Exception


def reason_of(error: BaseException) -> str:
    """The first line of an error of another library, with its class where that says more."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__} {line}"[:200] if isinstance(error, LookupError) or not line else line[:200]


def state_reason_of(error: BaseException) -> str:
    """The beginning of the last line of torch on a state that does not fit: the first names the model alone."""
    return str(error).splitlines()[-1].strip()[:200]
