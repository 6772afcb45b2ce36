"""Llama-like layers with sizes of their own as DeciLM (``nemotron-nas``), the class that vLLM, SGLang and mlx-lm have.

Its layers all have one number of query heads, H. A layer says how many of them share a key-value head, so its number of
KV heads divides H; what is missing is padded with zeros, which changes nothing. A part without units is left out.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from apt.deploy import configuration_decilm
from apt.deploy.source import Source
from apt.export.stock import stock_class
from apt.families import Anatomy, PlacedPart

CLASSES = ("LlamaForCausalLM", "MistralForCausalLM")  # whose layers are those of DeciLM
MULTIPLE = 256  # of the widths that `ffn_mult` can say: nemotron_nas.py, _ffn_mult_to_intermediate_size
SETTINGS = (  # of a Llama, that a DeciLM has under the same names
    *("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings", "rms_norm_eps", "hidden_act"),
    *("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "use_cache"),
)


@dataclass(frozen=True)
class Block:
    """The sizes that a layer is stored with; 0 where a part is left out."""

    kv_heads: int
    neurons: int


@dataclass(frozen=True)
class Deci:
    """The sizes that a model is stored with.

    Args:
        heads: query heads of every layer.
        head_dim: features of a head.
        blocks: of the layers.
    """

    heads: int
    head_dim: int
    blocks: list[Block]


def why_not_deci(source: Source) -> str | None:
    """What DeciLM lacks for a model, in words; None where it has all."""
    model = source.model
    config = model.config
    if stock_class(model).__name__ not in CLASSES or source.anatomy is None:
        return f"{stock_class(model).__name__} has other layers than a Llama"
    if getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
        return "an output bias of a layer without heads has no place in it"
    if getattr(config, "sliding_window", None) is not None:
        return f"it has no sliding window, and this model one of {config.sliding_window} tokens"
    if config.hidden_act != "silu":
        return f"its activation is silu, not {config.hidden_act}"
    return None


def deci_sizes(anatomy: Anatomy, *, multiple: int = 1, heads: int | None = None) -> Deci | None:
    """The least sizes that DeciLM can say.

    Args:
        anatomy: of a plain Llama-like model.
        multiple: that the numbers of neurons are rounded up to.
        heads: query heads of every layer; None takes those of the largest layer.

    Returns:
        The sizes; None where no number of KV heads divides `heads`.
    """
    config: Any = anatomy.model.config
    group = _group(anatomy.model)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    counts = [part.num_units for part in anatomy.attentions]
    counts[0] = max(1, counts[0])  # vLLM's first layer begins the residual stream in its attention
    heads = max(counts) * group if heads is None else heads
    kv_heads = [_least_divisor(heads, count, group) for count in counts]
    if None in kv_heads:
        return None
    widths = [-(-part.num_units // multiple) * multiple for part in anatomy.parts if part.table.kind == "neuron"]
    return Deci(heads, head_dim, [Block(kv or 0, width) for kv, width in zip(kv_heads, widths, strict=True)])


def write_deci(anatomy: Anatomy, sizes: Deci, folder: Path) -> list[str]:
    """Write the folder of a DeciLM: weights, configuration, and the class that reads that.

    Args:
        anatomy: of a plain Llama-like model.
        sizes: of `deci_sizes`.
        folder: that is there.

    Returns:
        What is padded, a line each.
    """
    model: Any = anatomy.model
    save_file(_state(anatomy, sizes), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_config(model, sizes), indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(configuration_decilm.__file__, folder / "configuration_decilm.py")
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    return _notes(anatomy, sizes)


def _group(model: Any) -> int:
    """Query heads that share a KV head."""
    return int(model.config.num_attention_heads // model.config.num_key_value_heads)


def _least_divisor(heads: int, count: int, group: int) -> int | None:
    """The least number of KV heads, at least `count`, that divides the query heads and leaves each its group."""
    if count == 0:
        return 0
    fitting = [kv for kv in range(count, heads // group + 1) if heads % kv == 0]
    return fitting[0] if fitting else None


def _state(anatomy: Anatomy, sizes: Deci) -> dict[str, Tensor]:
    """The tensors of all layers under their stock names; those of parts that are left out are not there."""
    model: Any = anatomy.model
    state: dict[str, Tensor] = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    for part in anatomy.parts:
        block = sizes.blocks[part.layer.index]
        stored = block.kv_heads if part.table.kind == "head" else block.neurons
        norm = "input_layernorm" if part.table.kind == "head" else "post_attention_layernorm"
        if stored == 0:
            for place in (*part.paths.values(), f"{part.layer.path}.{norm}"):
                state.pop(f"{place}.weight", None)  # linears of heads are gone already
        elif part.linears:
            state |= _padded(part, stored, sizes)
        else:
            state |= _zeros(part, stored, sizes)
    return {name: tensor.detach().contiguous() for name, tensor in state.items()}


def _padded(part: PlacedPart, stored: int, sizes: Deci) -> dict[str, Tensor]:
    """The linears of a part with zeros for the heads or neurons that it lacks."""
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    if part.table.kind == "neuron":
        shapes = dict.fromkeys(part.linears, ((part.num_units,), (stored,)))
    else:
        query = (part.num_units, _group(part.layer.model), sizes.head_dim)
        key_value = ((part.num_units, sizes.head_dim), (stored, sizes.head_dim))
        shapes = dict.fromkeys(("q", "o"), (query, (stored, sizes.heads // stored, sizes.head_dim)))
        shapes |= dict.fromkeys(("k", "v"), key_value)
    state = {}
    for role, linear in part.linears.items():
        weight: Any = linear.weight
        before, after = shapes[role]
        rows = weight.T if role == part.table.reader else weight  # the reader's units are its columns
        grid = rows.reshape(*before, rows.shape[-1])
        made = grid.new_zeros(*after, rows.shape[-1])
        made[tuple(slice(0, size) for size in grid.shape[:-1])] = grid
        flat = made.reshape(-1, rows.shape[-1])
        state[f"{part.paths[role]}.weight"] = flat.T if role == part.table.reader else flat
    return state


def _zeros(part: PlacedPart, stored: int, sizes: Deci) -> dict[str, Tensor]:
    """The linears of an attention that lost all heads and has to be there all the same."""
    model: Any = part.layer.model
    width = model.get_input_embeddings().weight.shape[1]
    rows = {"q": sizes.heads, "k": stored, "v": stored, "o": sizes.heads}
    shapes = {role: (count * sizes.head_dim, width) for role, count in rows.items()}
    made = {role: torch.zeros(shape, dtype=model.dtype) for role, shape in shapes.items()}
    return {f"{part.paths[role]}.weight": made[role].T if role == "o" else made[role] for role in made}


def _config(model: Any, sizes: Deci) -> dict[str, Any]:
    """What stands in config.json."""
    config = model.config
    rope = dict(config.rope_parameters)
    theta = rope.pop("rope_theta")
    width = model.get_input_embeddings().weight.shape[1]
    scaled = rope.get("rope_type", "default") != "default"
    by_mult = all(block.neurons % MULTIPLE == 0 for block in sizes.blocks)
    return {
        "model_type": configuration_decilm.DeciLMConfig.model_type,
        "architectures": ["DeciLMForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_decilm.DeciLMConfig"},
        **{name: getattr(config, name, None) for name in SETTINGS},
        "hidden_size": width,
        "num_attention_heads": sizes.heads,
        "head_dim": sizes.head_dim,
        "attention_bias": False,
        "mlp_bias": False,
        # mlx-lm and readers before transformers 5 look for the first two.
        "rope_theta": theta,
        **({"rope_scaling": rope} if scaled else {}),
        "rope_parameters": {"rope_theta": theta, **rope},
        "dtype": str(model.dtype).removeprefix("torch."),
        "block_configs": [_block(block, sizes, width, by_mult=by_mult) for block in sizes.blocks],
    }


def _block(block: Block, sizes: Deci, width: int, *, by_mult: bool) -> dict[str, Any]:
    """What config.json says of one layer. mlx-lm and SGLang know `ffn_mult` alone, vLLM takes it first."""
    attention: dict[str, Any] = {"no_op": block.kv_heads == 0, "replace_with_linear": False, "n_heads_in_group": None}
    if block.kv_heads:
        attention["n_heads_in_group"] = sizes.heads // block.kv_heads
    ffn: dict[str, Any] = {"no_op": block.neurons == 0, "replace_with_linear": False}
    if by_mult:
        ffn["ffn_mult"] = 1.5 * block.neurons / width if block.neurons else None
    else:
        ffn["intermediate_size"] = block.neurons or None
    return {"attention": attention, "ffn": ffn}


def _notes(anatomy: Anatomy, sizes: Deci) -> list[str]:
    """How much of what is stored is zeros, a line each."""
    kept = [part for part in anatomy.attentions if sizes.blocks[part.layer.index].kv_heads]
    group = _group(anatomy.model)
    widths = {part.layer.index: part.num_units for part in anatomy.parts if part.table.kind == "neuron"}
    counted = {
        "query heads": (len(kept) * sizes.heads, sum(part.num_units * group for part in kept)),
        "KV heads": (sum(block.kv_heads for block in sizes.blocks), sum(part.num_units for part in kept)),
        "neurons": (sum(block.neurons for block in sizes.blocks), sum(widths.values())),
    }
    return [
        f"{stored - real} of {stored} {title} are padding: zeros"
        for title, (stored, real) in counted.items()
        if stored > real
    ]
