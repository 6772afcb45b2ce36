"""A language model at toy size: a random Llama with its tokenizer, in a folder or as GGUF, and text it can learn."""

import random
from pathlib import Path
from typing import Any

import torch
from tiny_run import save_config

WORDS = [f"w{letter}" for letter in "abcdefghijklmnop"]
END = "<|endoftext|>"  # the one that transformers adds to a GPT-2 tokenizer from GGUF where it has none


def documents(count: int, seed: int = 0) -> list[str]:
    """Distinct texts in which each word tells the next, nine times of ten."""
    draw = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        word, words = draw.randrange(len(WORDS)), []
        for _ in range(draw.randint(20, 40)):
            words.append(WORDS[word])
            word = (word * 5 + 3) % len(WORDS) if draw.random() < 0.9 else draw.randrange(len(WORDS))
        found[" ".join(words)] = None
    return list(found)


def text_tokenizer() -> Any:
    """Byte-level BPE, as GPT-2's; most words are one token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer, plain.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    plain.train_from_iterator(documents(50), trainers.BpeTrainer(vocab_size=60, special_tokens=[END]))
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token=END, bos_token=END, unk_token=END)


def tiny_llama(layers: int = 2) -> Any:
    """A random Llama with grouped-query attention and tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(text_tokenizer()),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=64,
        initializer_range=0.2,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def write_llama(folder: Path) -> Path:
    """A model folder as the hub has them."""
    tiny_llama().save_pretrained(folder)
    text_tokenizer().save_pretrained(folder)
    return folder


def write_gguf(path: Path) -> Path:
    """The same model and tokenizer as one GGUF file, unquantized, as llama.cpp lays them out."""
    import json

    import gguf

    model, tokenizer = tiny_llama(), text_tokenizer()
    config, bpe = model.config, json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(bpe["vocab"], key=bpe["vocab"].get))
    writer.add_token_types([3, *[1] * (config.vocab_size - 1)])  # 3: special, 1: ordinary
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_unk_token_id, writer.add_pad_token_id):
        add(0)
    for name, tensor in model.model.state_dict().items():
        writer.add_tensor(_gguf_name(name), _in_pairs(name, tensor, config).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


GGUF_NAMES = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def _gguf_name(name: str) -> str:
    name = name.removesuffix(".weight")
    if not name.startswith("layers."):
        return f"{GGUF_NAMES[name]}.weight"
    _, layer, rest = name.split(".", 2)
    return f"blk.{layer}.{GGUF_NAMES[rest]}.weight"


def _in_pairs(name: str, weight: torch.Tensor, config: Any) -> torch.Tensor:
    """GGUF has the rows of q and k of a head as pairs that rotate together, Hugging Face the two halves one by one."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return weight
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_text_config(folder: Path, **sections: dict[str, Any]) -> Path:
    """A config of the language-modelling task with every size at toy scale; `sections` go on top."""
    (folder / "text.txt").write_text("\n\n".join(documents(160)), encoding="utf-8")
    document: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "model": {"name": str(write_llama(folder / "tiny")), "task": "language_modeling"},
        "data": {"datasets": str(folder / "text.txt"), "test_size": 30, "block_length": 16},
        "training": {"learning_rate": "3e-3", "batch_size": 8, "max_steps": 100, "logging_steps": 5},
        "pruning": {"target_sparsity": 0.3, "num_events": 2},
        "evaluation": {
            "inference_batch_size": 4,
            "inference_length": 8,
            "generated_tokens": 4,
            "inference_repeats": 2,
            "event_timing_steps": 2,
        },
        "hardware": {"num_threads": 1, "device": "cpu"},
    }
    document["model"]["target_modules"] = ["q", "v", "up", "down"]
    return save_config(folder, document, sections)
