"""The models and the text that PEFT's own tests take from the hub, made here: random, tiny, under the same names.

`write_hub` lays them out as the cache of the hub, so that everything which asks for a name finds a folder. The sizes
are such that each of PEFT's methods can divide them.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from tiny_text import documents, text_tokenizer

REVISION = "0" * 40
# Tokens of the tests go up to 1000; weights are large enough that an adapter shows in the logits.
SIZES = {
    "vocab_size": 1024,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 3,  # an id that the tests give no model: its embedding is zero, and would hide an adapter
}
GROUPED = {"num_key_value_heads": 2}
MIXED = {"layer_types": ["sliding_attention", "full_attention"]}
GEMMA3 = {**GROUPED, **MIXED, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16}
GEMMA4 = {  # the last two layers take keys and values of layers before them, and each kind has its own size of head
    **GROUPED,
    "layer_types": MIXED["layer_types"] * 2,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "head_dim": 8,
    "global_head_dim": 16,
    "sliding_window": 16,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 1024,
}
OPT = {"ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.1}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
GPTJ = {**GPT, "rotary_dim": 4}
BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "init_std": 0.1,
    "decoder_start_token_id": 2,
}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
DEBERTA = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}


class Served(NamedTuple):
    name: str  # on the hub
    config: str  # class names of transformers
    model: str
    settings: dict[str, Any]


SERVED = [
    Served("peft-internal-testing/opt-125m", "OPTConfig", "OPTForCausalLM", OPT),
    Served("peft-internal-testing/tiny-random-OPTForCausalLM", "OPTConfig", "OPTForCausalLM", OPT),
    Served("peft-internal-testing/tiny-random-GPT2LMHeadModel", "GPT2Config", "GPT2LMHeadModel", GPT),
    Served("hf-internal-testing/tiny-random-gpt2", "GPT2Config", "GPT2LMHeadModel", GPT),
    Served("gpt2", "GPT2Config", "GPT2LMHeadModel", GPT),
    Served("bert-base-uncased", "BertConfig", "BertModel", {}),
    Served(
        "peft-internal-testing/tiny-random-GPTJForCausalLM", "GPTJConfig", "GPTJForCausalLM", {**GPT, "rotary_dim": 4}
    ),
    Served("trl-internal-testing/tiny-random-LlamaForCausalLM", "LlamaConfig", "LlamaForCausalLM", {}),
    Served("hf-internal-testing/tiny-random-MistralForCausalLM", "MistralConfig", "MistralForCausalLM", GROUPED),
    Served("peft-internal-testing/tiny-dummy-qwen2", "Qwen2Config", "Qwen2ForCausalLM", GROUPED),
    Served("trl-internal-testing/tiny-Qwen3ForCausalLM", "Qwen3Config", "Qwen3ForCausalLM", {**GROUPED, "head_dim": 8}),
    Served("hf-internal-testing/tiny-random-Gemma3ForCausalLM", "Gemma3TextConfig", "Gemma3ForCausalLM", GEMMA3),
    Served("peft-internal-testing/tiny-random-gemma4-E2B", "Gemma4TextConfig", "Gemma4ForCausalLM", GEMMA4),
    Served(
        "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2",
        "LlamaConfig",
        "LlamaForSequenceClassification",
        {"num_labels": 1},
    ),
    Served(
        "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated",
        "T5Config",
        "T5ForConditionalGeneration",
        T5,
    ),
    Served(
        "peft-internal-testing/tiny-random-BartForConditionalGeneration",
        "BartConfig",
        "BartForConditionalGeneration",
        BART,
    ),
    *(
        Served(f"peft-internal-testing/tiny-random-{kind}{head}", f"{kind}Config", f"{kind}{head}", settings)
        for kind, head, settings in (
            ("Bert", "Model", {}),
            ("Bert", "ForSequenceClassification", {}),
            ("Roberta", "Model", {}),
            ("Roberta", "ForSequenceClassification", {}),
            ("Deberta", "Model", DEBERTA),
            ("DebertaV2", "Model", DEBERTA),
        )
    ),
]


def write_hub(cache: Path) -> None:
    """Write every model with its tokenizer as the cache of the hub has it.

    Args:
        cache: what the hub's client knows as HF_HUB_CACHE; made where it is not there.
    """
    import transformers

    for served in SERVED:
        folder = cache / f"models--{served.name.replace('/', '--')}"
        snapshot = folder / "snapshots" / REVISION
        snapshot.mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(REVISION, encoding="utf-8")
        torch.manual_seed(0)
        config = getattr(transformers, served.config)(**{**SIZES, **served.settings})
        getattr(transformers, served.model)(config).save_pretrained(snapshot)
        text_tokenizer().save_pretrained(snapshot)


def quotes() -> Any:
    """Text in the place of the data set ybelkada/english_quotes_copy."""
    from datasets import Dataset, DatasetDict

    return DatasetDict({"train": Dataset.from_dict({"quote": documents(50)})})
