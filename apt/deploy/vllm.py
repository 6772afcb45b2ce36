"""Folders that vLLM loads by classes of its own: a stock one, a DeciLM of layers that differ, or a padded one."""

import importlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apt.deploy import hf
from apt.deploy.deci import deci_sizes, why_not_deci, write_deci
from apt.deploy.formats import Comparison
from apt.deploy.padded import heads_by_width, lacks_heads, padded_model, padding_notes, why_not_padded
from apt.deploy.probe import BEGIN, TEXT, difference, greedy, inputs_of, logits_of
from apt.deploy.source import Source
from apt.export.stock import stock_class
from apt.families import anatomy_of

QUANTISED: tuple[str, ...] = ()
# Of vllm/model_executor/models/registry.py: those that make text, of the families that are pruned here.
CLASSES = (
    *("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Phi3ForCausalLM"),
    *("Gemma2ForCausalLM", "Gemma3ForCausalLM", "GPT2LMHeadModel", "OPTForCausalLM"),
)
DERIVED = ("qwen2",)  # its class there derives the size of a head from the number of heads, whatever the config says
CACHE = 1 << 28  # bytes of keys and values for a comparison


def refuse(source: Source) -> str | None:
    """What vLLM cannot say."""
    model = source.model
    name = stock_class(model).__name__
    if name not in CLASSES:
        return f"of {name} nothing was run in vLLM; written are {', '.join(CLASSES)}"
    if model.config.model_type == "qwen2" and len(set(getattr(model.config, "layer_types", None) or ())) > 1:
        return "vLLM's qwen2 has a sliding window in all layers or in none"
    for setting in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"):  # gpt2.py asserts that they are off
        if getattr(model.config, setting, False):
            return f"vLLM's gpt2 has no {setting}"
    if source.anatomy is not None and model.config.model_type in DERIVED and heads_by_width(source.anatomy) is None:
        return f"vLLM's {model.config.model_type} takes the hidden size over the number of heads for the size of a head"
    if source.is_stock or why_not_deci(source) is None:
        return None
    return why_not_padded(source, _least(source))


def write(source: Source, folder: Path, quantise: str | None) -> list[str]:
    """Copy a folder that is uniform already, or write a DeciLM, or else the padded model."""
    anatomy = source.anatomy
    if anatomy is None or (source.is_stock and not lacks_heads(anatomy, _least(source))):
        return hf.write(source, folder, quantise)
    reason = why_not_deci(source)
    sizes = None if reason else deci_sizes(anatomy)
    if sizes is not None:
        return [*write_deci(anatomy, sizes, folder), "load it with trust_remote_code: its configuration is a class"]
    padded = padded_model(anatomy, _least(source))
    padded.save_pretrained(folder)
    return [f"padded to one shape, as for DeciLM {reason}", *padding_notes(anatomy, anatomy_of(padded))]


def _least(source: Source) -> dict[str, int]:
    """Units that each layer has to have."""
    if source.anatomy is None or source.model.config.model_type not in DERIVED:
        return {}
    return {"head": heads_by_width(source.anatomy) or 0}


def compare(source: Source, folder: Path, quantise: str | None) -> Comparison:
    """Load it by vLLM in this process: the logarithms of probabilities of a prompt, and greedy text.

    vLLM shows no logits, so both sides are compared behind a softmax. The window of inputs has no padding.
    """
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # no process of its own outlives this one
    vllm: Any = importlib.import_module("vllm")
    inputs = inputs_of(source.model, padded=False)
    engine = vllm.LLM(
        model=str(folder),
        trust_remote_code=True,
        dtype=str(source.model.dtype).removeprefix("torch."),
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=BEGIN + TEXT,
        max_logprobs=-1,
        kv_cache_memory_bytes=CACHE,
        enable_prefix_caching=False,
    )
    ids = inputs["input_ids"]
    theirs = _log_probabilities(vllm, engine, ids, source.model.config.vocab_size)
    ours = logits_of(source.model, inputs)[:, :-1].log_softmax(-1)
    text = vllm.SamplingParams(temperature=0, min_tokens=TEXT, max_tokens=TEXT, ignore_eos=True, detokenize=False)
    made = engine.generate([{"prompt_token_ids": ids[0, :BEGIN].tolist()}], text, use_tqdm=False)
    same = list(made[0].outputs[0].token_ids) == greedy(source.model, inputs)
    return Comparison(f"vLLM {vllm.__version__}", difference(theirs, ours), same)


def _log_probabilities(vllm: Any, engine: Any, ids: Tensor, vocabulary: int) -> Tensor:
    """Logarithms of the probability of each next token of the prompts, ``[B, S - 1, V]``."""
    asked = vllm.SamplingParams(max_tokens=1, prompt_logprobs=-1, detokenize=False)
    answers = engine.generate([{"prompt_token_ids": row.tolist()} for row in ids], asked, use_tqdm=False)
    rows = [[[told[token].logprob for token in range(vocabulary)] for told in a.prompt_logprobs[1:]] for a in answers]
    return torch.tensor(rows)
