"""The samples of each task's format in tests/data, and models and configs of toy size that read them."""

import json
from pathlib import Path
from typing import Any

import torch
from tiny_run import save_config

from apt.runs.data.instructions import WITH_INPUT, WITHOUT_INPUT

DATA = Path(__file__).parent / "data"
END, START_OF_TURN, END_OF_TURN, PAD = "<|end|>", "<|turn|>", "<|done|>", "<|pad|>"
CHAT = (
    "{% for message in messages %}<|turn|>{{ message.role }}\n{{ message.content }}<|done|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)


def rows_of(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def word_tokenizer(chat: bool = False) -> Any:
    """Byte-level BPE trained on the samples: it spells every text, and has most of their words as one token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer, plain.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=[PAD, END, START_OF_TURN, END_OF_TURN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    texts = [path.read_text(encoding="utf-8") for path in sorted(DATA.glob("*.jsonl"))]
    plain.train_from_iterator([*texts, *[WITH_INPUT, WITHOUT_INPUT] * 5], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=[START_OF_TURN, END_OF_TURN],
    )
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    if chat:
        tokenizer.chat_template = CHAT
    return tokenizer


SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "eos_token_id": 1,
}


def tiny_decoder() -> Any:
    """A random Llama for the vocabulary of `word_tokenizer`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    settings = {"bos_token_id": 1, "num_key_value_heads": 2, "tie_word_embeddings": True}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(word_tokenizer()), **SIZES, **settings)).eval()


def tiny_reader() -> Any:
    """A random BERT for the vocabulary of `word_tokenizer`."""
    from transformers import BertConfig, BertForQuestionAnswering

    torch.manual_seed(0)
    sizes = {name: size for name, size in SIZES.items() if name != "eos_token_id"}
    return BertForQuestionAnswering(BertConfig(vocab_size=len(word_tokenizer()), **sizes)).eval()


def tiny_encoder_decoder() -> Any:
    """A random T5 for the vocabulary of `word_tokenizer`."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    settings = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    special = {"pad_token_id": 0, "eos_token_id": 1}
    return T5ForConditionalGeneration(T5Config(vocab_size=len(word_tokenizer()), **settings, **special)).eval()


def write_task_config(folder: Path, model: Any, tokenizer: Any, /, **sections: dict[str, Any]) -> Path:
    """A config for a model, whose folder it writes, with every size at toy scale; `sections` go on top."""
    model.save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")
    document: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "model": {"name": str(folder / "tiny"), "target_modules": ["q", "v", "up", "down"]},
        "data": {"max_length": 128},
        "training": {"learning_rate": "3e-3", "batch_size": 4, "max_steps": 40, "logging_steps": 5},
        "pruning": {"target_sparsity": 0.3, "num_events": 2},
        "evaluation": {
            "inference_batch_size": 3,
            "inference_length": 8,
            "generated_tokens": 4,
            "inference_repeats": 2,
            "event_timing_steps": 1,
        },
        "hardware": {"num_threads": 1, "device": "cpu"},
    }
    return save_config(folder, document, sections)
