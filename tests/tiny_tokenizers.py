"""Small tokenizers of the kinds that llama.cpp has names for, learnt from this repository's own pages."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BEGIN, END, TURN = "<s>", "</s>", "<|turn|>"
CHAT = "{% for message in messages %}<|turn|>{{ message.content }}{% endfor %}"
ROOT = Path(__file__).resolve().parents[1]


def learnt_text() -> list[str]:
    """What the tokenizers learn from."""
    pages = [(ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("architecture.md", "export.md")]
    return [*pages, " 1234 56789 12 don't We'LL ünïcode 日本語 " * 5]


def byte_level(splits: Sequence[tuple[str, Any]], *, begins: bool) -> Any:
    """BPE over bytes.

    Args:
        splits: steps of its pre-tokenizer, as `apt.deploy.gguf_tokens.SPLITS` names them.
        begins: whether it puts a token before every text, and takes whole words without merging them.
    """
    plain = Tokenizer(models.BPE(ignore_merges=begins))
    plain.pre_tokenizer = pre_tokenizers.Sequence([_step(*split) for split in splits])
    plain.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    settings = {"vocab_size": 500, "special_tokens": [BEGIN, END], "initial_alphabet": alphabet}
    plain.train_from_iterator(learnt_text(), trainers.BpeTrainer(**settings))
    return _finished(plain, begins=begins)


def _step(kind: str, setting: Any) -> Any:
    if kind == "ByteLevel":
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=setting)
    if kind == "Digits":
        return pre_tokenizers.Digits(individual_digits=setting)
    return pre_tokenizers.Split(Regex(setting), "isolated")


def with_bytes(*, space_ahead: bool) -> Any:
    """BPE over characters as sentencepiece's, with bytes to fall back on: all pairs that give a token are merges."""
    base = Tokenizer(models.BPE())
    base.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    base.train_from_iterator(learnt_text(), trainers.BpeTrainer(vocab_size=400))
    by_id = sorted(base.get_vocab().items(), key=lambda item: item[1])
    texts = [text for text, _ in by_id]
    first = ["<unk>", BEGIN, END, *(f"<0x{byte:02X}>" for byte in range(256))]
    order = [*first, *(t for t in texts if len(t) > 1), *(t for t in texts if len(t) == 1)]
    vocabulary = {text: index for index, text in enumerate(order)}
    pairs = [(text[:cut], text[cut:]) for text in texts for cut in range(1, len(text))]
    merges = sorted((p for p in pairs if {*p} <= vocabulary.keys()), key=lambda pair: vocabulary["".join(pair)])
    model = models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    plain = Tokenizer(model)
    ahead = [normalizers.Prepend("▁")] if space_ahead else []
    plain.normalizer = normalizers.Sequence([*ahead, normalizers.Replace(" ", "▁")])
    plain.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return _finished(plain, begins=True)


def _finished(plain: Any, *, begins: bool) -> Any:
    if begins:
        plain.post_processor = processors.TemplateProcessing(
            single=f"{BEGIN} $A",
            pair=f"{BEGIN} $A {BEGIN} $B",
            special_tokens=[(BEGIN, plain.token_to_id(BEGIN))],
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, bos_token=BEGIN, eos_token=END)
    tokenizer.add_special_tokens({"additional_special_tokens": [TURN]})
    tokenizer.chat_template = CHAT
    return tokenizer
