"""Folders that mlx-lm loads: a stock one, a DeciLM of layers that differ, or a padded one; then run by MLX.

mlx-lm reads some settings where transformers wrote them before version 5, and takes a default of its own where they are
not there. They are written in both places.
"""

import importlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import torch

from apt.deploy import hf
from apt.deploy.deci import MULTIPLE, Deci, deci_sizes, why_not_deci, write_deci
from apt.deploy.formats import Comparison
from apt.deploy.padded import heads_by_width, lacks_heads, padded_model, padding_notes, stream_width, why_not_padded
from apt.deploy.probe import BEGIN, TEXT, difference, greedy, inputs_of, logits_of
from apt.deploy.source import Source
from apt.export.stock import stock_class
from apt.families import anatomy_of

QUANTISED: tuple[str, ...] = ()
CLASSES = {  # of mlx_lm/models, of the families that are pruned here; the activation that is fixed there
    "LlamaForCausalLM": "silu",
    "MistralForCausalLM": "silu",
    "Qwen2ForCausalLM": "silu",
    "Qwen3ForCausalLM": "silu",
    "Phi3ForCausalLM": "silu",
    "Gemma2ForCausalLM": "gelu_pytorch_tanh",
    "Gemma3ForCausalLM": "gelu_pytorch_tanh",
}
DERIVED = ("qwen2", "phi3")  # classes there that derive the size of a head from the number of heads


def refuse(source: Source) -> str | None:
    """What mlx-lm cannot say."""
    model, name = source.model, stock_class(source.model).__name__
    if name not in CLASSES:
        return f"of {name} nothing was run in mlx-lm; written are {', '.join(CLASSES)}"
    config = model.config
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation != CLASSES[name]:
        return f"its {config.model_type} has the activation {CLASSES[name]}, not {activation}"
    if config.model_type == "gemma3_text" and _pattern(config) is None:
        return "its gemma3 looks at everything in every n-th layer, and this one in others"
    if source.anatomy is not None and config.model_type in DERIVED and heads_by_width(source.anatomy) is None:
        return f"its {config.model_type} takes the hidden size over the number of heads for the size of a head"
    return None if source.is_stock or _deci(source) is not None else why_not_padded(source, _least(source))


def write(source: Source, folder: Path, quantise: str | None) -> list[str]:
    """A stock folder or a DeciLM, with what mlx-lm looks for in its configuration."""
    anatomy, sizes = source.anatomy, _deci(source)
    if anatomy is not None and sizes is not None and not source.is_stock:
        return write_deci(anatomy, sizes, folder)
    config = source.model.config
    notes: list[str] = []
    if anatomy is None or (source.is_stock and not lacks_heads(anatomy, _least(source))):
        hf.write(source, folder, quantise)
    else:
        padded = padded_model(anatomy, _least(source))
        padded.save_pretrained(folder)
        config, notes = padded.config, ["padded to one shape", *padding_notes(anatomy, anatomy_of(padded))]
    _tell_all(config, folder / "config.json")
    if (window := _lost_window(config)) is not None:
        notes.append(f"mlx-lm's {config.model_type} has no sliding window: other answers behind {window} tokens")
    return notes


def _deci(source: Source) -> Deci | None:
    """Sizes of a DeciLM. mlx-lm's derives the size of a head from their number, and knows widths as `ffn_mult`."""
    if source.anatomy is None or why_not_deci(source) is not None:
        return None
    config, width = source.model.config, stream_width(source.anatomy)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return None if width % head_dim else deci_sizes(source.anatomy, multiple=MULTIPLE, heads=width // head_dim)


def _least(source: Source) -> dict[str, int]:
    """Units that each layer has to have."""
    if source.anatomy is None or source.model.config.model_type not in DERIVED:
        return {}
    return {"head": heads_by_width(source.anatomy) or 0}


def _tell_all(config: Any, path: Path) -> None:
    """Write every setting, as mlx-lm has defaults of its own, and those of rope under their old names too.

    Args:
        config: of the model that is in the folder.
        path: of its config.json.
    """
    settings = {**config.to_dict(), **json.loads(path.read_text(encoding="utf-8"))}
    rope = settings["rope_parameters"]
    wide, local = rope.get("full_attention", rope), rope.get("sliding_attention")
    settings["rope_theta"] = wide["rope_theta"]
    if local is not None:
        settings["rope_local_base_freq"] = local["rope_theta"]
    if "partial_rotary_factor" in wide:
        settings["partial_rotary_factor"] = wide["partial_rotary_factor"]
    if wide.get("rope_type", "default") != "default":
        settings["rope_scaling"] = {"type": wide["rope_type"], **wide}
    if config.model_type == "gemma3_text":
        settings["sliding_window_pattern"] = _pattern(config)
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _pattern(config: Any) -> int | None:
    """Every how many layers one looks at everything; None where it is not every n-th."""
    kinds = list(config.layer_types)
    if "full_attention" not in kinds:
        return None
    every = kinds.index("full_attention") + 1
    fits = [(number % every == 0) == (kind == "full_attention") for number, kind in enumerate(kinds, start=1)]
    return every if all(fits) else None


def _lost_window(config: Any) -> int | None:
    """Tokens of a sliding window that is shorter than the texts of the model, and that mlx-lm leaves out."""
    window = getattr(config, "sliding_window", None)
    looks_back = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    lost = config.model_type != "gemma3_text" and window is not None and looks_back
    return window if lost and window < config.max_position_embeddings else None


def compare(source: Source, folder: Path, quantise: str | None) -> Comparison:
    """Load it by mlx-lm. It knows no padding mask, so the rows have none."""
    mx: Any = importlib.import_module("mlx.core")
    load: Any = importlib.import_module("mlx_lm.utils")
    steps: Any = importlib.import_module("mlx_lm.generate")
    model, _ = load.load_model(folder)
    inputs = inputs_of(source.model, padded=False)
    ids = inputs["input_ids"]
    theirs = torch.tensor(model(mx.array(ids.tolist())).astype(mx.float32).tolist())
    off = difference(theirs, logits_of(source.model, inputs))
    made = steps.generate_step(mx.array(ids[0, :BEGIN].tolist()), model, max_tokens=TEXT)
    version = importlib.metadata.version("mlx-lm")
    return Comparison(f"mlx-lm {version}", off, [int(token) for token, _ in made] == greedy(source.model, inputs))
