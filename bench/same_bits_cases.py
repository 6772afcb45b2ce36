"""The runs that `bench.same_bits` compares, and the tiny models, the config and the data that they read.

Models are random, made by transformers alone. Their dropout is that of their families, so that the order in which
random numbers are drawn is compared too.
"""

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ENCODERS = ("bert", "roberta", "deberta-v2", "distilbert")
DECODERS = ("opt", "llama", "mistral", "qwen2", "qwen3", "gpt2", "phi3", "gemma2", "gemma3_text")
ENCODER_DECODERS = ("t5", "mt5")
FAMILIES = (*ENCODERS, *DECODERS, *ENCODER_DECODERS)
WITH_HIDDEN = ("bert", "llama", "gpt2", "t5")
DATA = {  # task -> its file in tests/data
    "classification": "reviews.csv",
    "regression": "pairs.csv",
    "language_modeling": "stories.txt",
    "instruction_following": "instructions.jsonl",
    "summarization": "summaries.jsonl",
    "question_answering": "questions.jsonl",
}
CONFIG: dict[str, dict[str, Any]] = {
    "model": {"target_modules": ["q", "v", "up", "down"]},
    "data": {"test_size": 4, "max_length": 32, "max_target_length": 12, "block_length": 16},
    "training": {"initial_rank": 2, "learning_rate": 3e-3, "batch_size": 4, "max_steps": 16, "logging_steps": 1},
    "pruning": {"target_sparsity": 0.4, "num_events": 2, "prune_end": 0.6},
    "evaluation": {
        "inference_batch_size": 4,
        "inference_length": 8,
        "inference_repeats": 1,
        "generated_tokens": 2,
        "event_timing_steps": 0,
    },
    "hardware": {"num_threads": 1, "device": "cpu"},
}
HIDDEN = ("pruning.unit_types=[head, neuron, hidden]", "pruning.target_sparsity=0.6", "pruning.round_to=4")
TEACHER = ("distillation.use_self_distillation=true", "distillation.distill_end=0.9")
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,  # at the usual 0.02 a wrong neuron moves a logit by 1e-4
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
T5 = {"d_kv": 8, "d_ff": 48, "num_decoder_layers": 2, "relative_attention_num_buckets": 8, "decoder_start_token_id": 0}
GROUPED = {"num_key_value_heads": 2}  # two query heads share a key
GEMMA = {**GROUPED, "head_dim": 8, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
OWN_SIZES: dict[str, dict[str, Any]] = {  # what a family calls otherwise, or must be told besides
    "deberta-v2": {
        "relative_attention": True,
        "position_buckets": 4,
        "pos_att_type": ["p2c", "c2p"],
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
        "position_biased_input": False,
        "type_vocab_size": 0,
    },
    "distilbert": {"hidden_dim": 48},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.2},
    **dict.fromkeys(("llama", "qwen2", "phi3"), GROUPED),
    "mistral": {**GROUPED, "sliding_window": 8},
    "qwen3": {**GROUPED, "head_dim": 16},
    "gpt2": {"n_inner": 48},
    **dict.fromkeys(("gemma2", "gemma3_text"), GEMMA),
    "t5": T5,
    "mt5": {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
}
PAD, END = "<|pad|>", "<|end|>"
CHAT = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run of the command line: `apt train` with a config and overrides."""

    name: str
    config: str  # in either checkout; "": the one that `write_inputs` wrote
    model: str = ""  # family of the tiny model that it reads; "": the config names its own
    task: str = ""
    overrides: tuple[str, ...] = ()
    killed: bool = False  # once it has a checkpoint; then it is resumed

    def arguments(self, inputs: Path, data: Path) -> list[str]:
        """What stands behind ``apt train``, but for the output folder."""
        if self.config:
            return [self.config, *self.overrides]
        read = [f"model.name={inputs / self.model}", f"data.datasets={data / DATA[self.task]}"]
        return [str(inputs / "config.yaml"), *read, f"model.task={self.task}", *self.overrides]


def tiny(name: str, model: str, *overrides: str, task: str = "", killed: bool = False) -> Case:
    """A run of a tiny model, on the task that its family is for unless another is named."""
    own = "classification" if model in ENCODERS else "language_modeling"
    if model in ENCODER_DECODERS:
        own = "summarization"
    return Case(name=name, config="", model=model, task=task or own, overrides=overrides, killed=killed)


def family(name: str) -> Case:
    """A run of APT: heads and neurons go, in some families hidden dimensions too, ranks grow, a teacher helps."""
    if name in WITH_HIDDEN:
        return tiny(name, name, *TEACHER, *HIDDEN)
    return tiny(name, name, *TEACHER)


def method(name: str, model: str, *overrides: str, prune: bool = False) -> Case:
    """A run by another method than APT."""
    if prune:
        return tiny(f"{name}-prune", model, f"model.method={name}", "model.prune=true", *overrides)
    return tiny(name, model, f"model.method={name}", *overrides)


def ablation(name: str, model: str, task: str, *overrides: str) -> Case:
    """A run of APT without one of its parts."""
    return tiny(name, model, f"ablation={name}", *TEACHER, *overrides, task=task)


def all_cases() -> list[Case]:
    """Every case, in the order in which they run.

    A process spends most of its seconds on imports, so a run tries several things at once where they do not hide each
    other: hidden dimensions with four of the families, tasks and ways to score units with ablations and methods.
    """
    demo = ("training.max_steps=120", "hardware.device=cpu", "hardware.num_threads=1")
    prompt = ("model.target_modules=null", "prompt.num_virtual_tokens=4")
    uniform = ("pruning.layout=uniform", "training.optimizer=nadam")
    before = ("pruning.prune_before_tuning=true", "pruning.calibration_batches=2", "tuning.num_tuning_events=2")
    # Until T5 writes words of the summaries, and ROUGE is not 0.
    longer = ("training.max_steps=40", "training.learning_rate=0.02")
    stopped = ("training.max_steps=60", "training.save_steps=20", "training.gradient_accumulation_steps=2")
    return [
        Case(name="demo", config="examples/demo.yaml", overrides=demo),
        *map(family, FAMILIES),
        method("lora", "bert"),
        method("lora", "bert", *uniform, prune=True),
        method("adalora", "bert"),
        method("adalora_simple", "llama", prune=True),
        method("gsa", "bert", "pruning.salience=gate_taylor", prune=True),
        method("spectral_a", "bert"),
        method("spectral_r", "t5", "pruning.salience=magnitude", *longer, prune=True),
        method("dynacsg", "bert", "pruning.salience=sum_of_products", prune=True),
        method("p_tuning", "bert", *prompt),
        method("prefix_tuning", "llama", *prompt),
        method("full", "bert", "model.target_modules=null", "evaluation.score_steps=5"),
        ablation("w/o_Ap", "bert", "regression"),
        ablation("w/o_AT", "bert", "question_answering"),
        ablation("w/o_Ds", "llama", "instruction_following"),
        ablation("w/o_kurtosis", "llama", "language_modeling", "tuning.rule=paper"),
        ablation("uniform_growth", "bert", "classification", "distillation.teacher_refresh=true"),
        tiny("prune_before_tuning", "llama", *before),
        tiny("resumed", "bert", *TEACHER, *stopped, killed=True),
    ]


def add_option(parser: argparse.ArgumentParser) -> None:
    names = [case.name for case in all_cases()]
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=names, default=names, help=", ".join(names))


def write_inputs(folder: Path, data: Path, models: Iterable[str]) -> None:
    """The config of the tiny cases, and a folder for each model with its weights, config and tokenizer.

    Args:
        folder: is made.
        data: holds the samples of each task, of which the tokenizer learns its words.
        models: families, each once.
    """
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG), encoding="utf-8")
    for family in models:
        _write_model(folder / family, family, data)


def _write_model(folder: Path, family: str, data: Path) -> None:
    import torch
    import transformers

    tokenizer = _tokenizer(data)
    torch.manual_seed(1)
    sizes = {**SIZES, **OWN_SIZES.get(family, {}), "vocab_size": len(tokenizer)}
    config = transformers.AutoConfig.for_model(family, **sizes)
    kind: Any = transformers.AutoModelForCausalLM
    if family in ENCODERS:
        kind = transformers.AutoModel
    if family in ENCODER_DECODERS:
        kind = transformers.AutoModelForSeq2SeqLM
    model = kind.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases start at 0, norms at 1, Gemma's norms at 0
                parameter.normal_(parameter[0].item(), 0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tokenizer(data: Path) -> Any:
    """Byte-level BPE that spells every text and has the most frequent parts of the samples as tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=[PAD, END], initial_alphabet=alphabet)
    plain.train([str(data / name) for name in DATA.values()], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token=END, pad_token=PAD)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.chat_template = CHAT
    return tokenizer
