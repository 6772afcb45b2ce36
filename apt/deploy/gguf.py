"""One GGUF file for llama.cpp: free layouts as `deci` or `openelm`, all else padded; checked in llama.cpp."""

import copy
from pathlib import Path
from typing import Any

import gguf
import torch

from apt.deploy.formats import Comparison
from apt.deploy.gguf_archs import ARCHS
from apt.deploy.gguf_model import Decoder
from apt.deploy.gguf_tokens import add_tokens
from apt.deploy.gguf_types import F32, MIXED, PLAIN, numbers, quantise_file, ragged_note, type_of
from apt.deploy.probe import BEGIN, LENGTH, TEXT, difference, greedy, inputs_of, logits_of
from apt.deploy.source import Source

QUANTISED = (F32, *(name for name in PLAIN if name != F32), *MIXED)
FILE = "model.gguf"
KEPT = {torch.float32: F32, torch.bfloat16: "bf16", torch.float16: "f16"}  # numbers as they are
TEXTS = ("Hello world, it's 12345 o'clock!", "a  b\n\n\tc \r\n", " é 日本語 🙂 ", "WE'LL: 1 22 333, x_y(z) != 4.5e-6;")
ROPES = ("default", "linear", "llama3")


def refuse(source: Source) -> str | None:
    """What no architecture of llama.cpp has a word for."""
    config = source.model.config
    if config.model_type not in ARCHS:
        return f"{config.model_type} has no writer here; those of {', '.join(sorted(ARCHS))} have"
    if not source.generates or source.anatomy is None:
        return f"a {type(source.model).__name__} makes no text; only decoders with their head are written"
    decoder = Decoder(source.model, source.anatomy)
    try:
        arch = decoder.layout.arch
    except ValueError as error:
        return str(error)
    names = ("hidden_act", "hidden_activation", "activation_function")
    act = next(value for name in names if (value := getattr(config, name, None)) is not None)
    rope = decoder.rope()
    has_bias = {role for block in decoder.blocks for role, bias in block.biases.items() if bias.any()}
    reasons = {
        f"an FFN of {arch.name} has no activation {act}": act not in arch.acts,
        f"{arch.name} has no bias of {', '.join(sorted(has_bias - {*arch.biases}))}": bool(has_bias - {*arch.biases}),
        f"rotary embeddings of type {rope.get('rope_type')} are not written": _odd_rope(decoder, rope),
        f"{arch.name} turns whole heads": rope.get("partial_rotary_factor", 1) != 1 and not arch.partial,
        f"{arch.name} has no word for which of its layers see a window": arch.windows and decoder.odd_windows,
        f"the head of {arch.name} is the embedding": arch.tied and decoder.own_head is not None,
        "its attention looks ahead": bool(getattr(config, "use_bidirectional_attention", False)),
        f"{arch.name} has no soft cap of scores": _caps_scores(config) and arch.name != "gemma2",
        f"it has numbers that {arch.name} has no place for: {', '.join(decoder.unread())}": bool(decoder.unread()),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _odd_rope(decoder: Decoder, rope: dict[str, Any]) -> bool:
    kind = rope.get("rope_type", "default")
    return kind not in ROPES or (kind == "llama3" and not decoder.layout.arch.factors)


def _caps_scores(config: Any) -> bool:
    return getattr(config, "attn_logit_softcapping", None) is not None


def write(source: Source, folder: Path, quantise: str | None) -> list[str]:
    """Write `model.gguf`, tokenizer included."""
    assert source.anatomy is not None
    decoder = Decoder(source.model, source.anatomy)
    kind = quantise or KEPT[next(source.model.parameters()).dtype]
    path = folder / FILE
    if kind in PLAIN:
        notes = _write_plain(source, decoder, path, kind)
    else:
        whole = folder / "float32.gguf"
        notes = _write_plain(source, decoder, whole, F32)
        quantise_file(whole, path, kind)
        whole.unlink()
    ragged = ragged_note(path, kind, decoder.hidden)
    return [*_padding_notes(decoder), *notes, *([ragged] if ragged else [])]


def _write_plain(source: Source, decoder: Decoder, path: Path, kind: str) -> list[str]:
    wanted, file_type = PLAIN[kind]
    writer = gguf.GGUFWriter(path, decoder.layout.arch.name)
    writer.add_name(Path(source.name).name)
    writer.add_file_type(int(file_type))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for name, value in _settings(decoder).items():
        getattr(writer, f"add_{name}")(value)
    notes = add_tokens(writer, source)
    for name, tensor in decoder.tensors():
        found = type_of(name, tensor, wanted)
        writer.add_tensor(name, numbers(tensor, found), raw_dtype=found)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return notes


def _settings(decoder: Decoder) -> dict[str, Any]:
    """What a file says of sizes, by the names of the methods of `GGUFWriter`."""
    config, layout, shape = decoder.config, decoder.layout, decoder.shape
    queries = [heads * shape.queries for heads in layout.heads]
    settings: dict[str, Any] = {
        "context_length": decoder.context,
        "embedding_length": decoder.hidden,
        "block_count": len(decoder.blocks),
        "feed_forward_length": layout.neurons if layout.arch.free else layout.neurons[0],
        "head_count": queries if layout.arch.free else queries[0],
        "head_count_kv": layout.heads if layout.arch.free else layout.heads[0],
        "key_length": shape.size,
        "value_length": shape.size,
        "vocab_size": int(decoder.model.get_input_embeddings().weight.shape[0]),
    }
    if (epsilon := getattr(config, "rms_norm_eps", None)) is not None:
        settings["layer_norm_rms_eps"] = float(epsilon)
    else:
        settings["layer_norm_eps"] = float(config.layer_norm_epsilon)
    caps = {"attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"}
    settings |= {name: float(getattr(config, key)) for name, key in caps.items() if getattr(config, key, None)}
    return settings | _rope_settings(decoder) | _window_settings(decoder)


def _rope_settings(decoder: Decoder) -> dict[str, Any]:
    rope = decoder.rope()
    if not rope:
        return {}
    turned = int(decoder.shape.size * rope.get("partial_rotary_factor", 1))
    settings: dict[str, Any] = {"rope_dimension_count": turned, "rope_freq_base": float(rope["rope_theta"])}
    if rope.get("rope_type") == "linear":
        settings |= {"rope_scaling_type": gguf.RopeScalingType.LINEAR, "rope_scaling_factor": float(rope["factor"])}
    sliding = (decoder.config.rope_parameters or {}).get("sliding_attention")
    return settings | ({"rope_freq_base_swa": float(sliding["rope_theta"])} if sliding else {})


def _window_settings(decoder: Decoder) -> dict[str, Any]:
    if not decoder.layout.arch.windows or decoder.window is None:
        return {}
    return {"sliding_window": decoder.window, "sliding_window_pattern": decoder.period}


def _padding_notes(decoder: Decoder) -> list[str]:
    """What zeros were added, and where the file is the model no longer."""
    arch, shape, notes = decoder.layout.arch, decoder.shape, []
    pairs = list(zip(decoder.blocks, decoder.layout.heads, decoder.layout.neurons, strict=True))
    heads = sum(most - block.heads for block, most, _ in pairs)
    neurons = sum(most - block.neurons for block, _, most in pairs)
    if heads or neurons:
        before = sum(tensor.numel() for block in decoder.blocks for tensor in block.weights.values())
        of_head = (2 * shape.queries + 2) * shape.size
        of_neuron = len({"gate", "up", "down"} & set(decoder.blocks[0].weights))
        added = (heads * of_head + neurons * of_neuron) * decoder.hidden
        notes.append(
            f"{arch.name} cannot say all sizes of these layers: zeros were added for {heads} KV heads and {neurons} "
            f"neurons, {added:,} numbers to the {before:,} of the matrices in layers"
        )
    if decoder.context < decoder.config.max_position_embeddings:
        notes.append(f"{arch.name} knows no sliding window: the file is the model for up to {decoder.context} tokens")
    return notes


def compare(source: Source, folder: Path, quantise: str | None) -> Comparison:
    """Read the same tokens in llama.cpp and in torch, the model in float32."""
    from apt.deploy.gguf_run import LlamaCpp

    assert source.anatomy is not None
    context = Decoder(source.model, source.anatomy).context
    model = copy.deepcopy(source.model).float()
    length, text = min(LENGTH, context), min(TEXT, context - BEGIN)
    inputs = {name: value[:, :length] for name, value in inputs_of(model, padded=False).items()}
    theirs = LlamaCpp(folder / FILE, context=BEGIN + TEXT + LENGTH)
    made = []
    for row in inputs["input_ids"].tolist():
        theirs.fresh()
        made.append(theirs.logits(row))
    ends = getattr(model.generation_config, "eos_token_id", None)
    ends = ends if isinstance(ends, list) else [ends] * (ends is not None)
    same = None
    if text > 0:  # not where a window is shorter than what text goes on from
        same = theirs.greedy(inputs["input_ids"][0, :BEGIN].tolist(), text, ends) == greedy(model, inputs, text)
    program = f"{theirs.program}{_told_of_tokens(theirs, source.folder)}"
    return Comparison(program, difference(torch.stack(made), logits_of(model, inputs)), same)


def _told_of_tokens(theirs: Any, folder: Path) -> str:
    """Whether a tokenizer in the file cuts texts as that of the source; nothing where it has none."""
    if not theirs.has_tokenizer:
        return ""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    others = [text for text in TEXTS if theirs.tokens(text) != tokenizer(text).input_ids]
    return f" (OTHER TOKENS of {others})" if others else f" (the same tokens of {len(TEXTS)} texts)"
