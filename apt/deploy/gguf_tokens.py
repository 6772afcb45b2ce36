"""The tokenizer of a source in a GGUF file: byte-level BPE as `gpt2`, BPE with bytes to fall back on as `llama`.

What llama.cpp has no word for is left out with a note: without a tokenizer a file still takes and gives token ids.
"""

import json
from pathlib import Path
from typing import Any

import gguf
from gguf import GGUFWriter, TokenType

from apt.deploy.source import Source

NO_TOKENIZER = "none"
ENDINGS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
SPLITS = {  # how a byte-level tokenizer cuts words -> its name in llama.cpp (src/llama-vocab.cpp)
    (("ByteLevel", True),): "gpt-2",
    (("Digits", True), ("ByteLevel", True)): "smollm",
    (("Split", WORDS + r"\p{N}{1,3}|" + ENDINGS), ("ByteLevel", False)): "llama-bpe",
    (("Split", WORDS + r"\p{N}|" + ENDINGS), ("ByteLevel", False)): "qwen2",
}


def add_tokens(writer: GGUFWriter, source: Source) -> list[str]:
    """Write tokens, special tokens and the chat template of a source.

    Args:
        writer: of the file.
        source: what is exported; its folder may hold `tokenizer.json`.

    Returns:
        A line where the file has no tokenizer.
    """
    size = int(source.model.get_input_embeddings().weight.shape[0])
    path = source.folder / "tokenizer.json"
    reason = None if path.is_file() else f"{source.name} has no tokenizer.json"
    table: dict[str, Any] = {} if reason else json.loads(path.read_text(encoding="utf-8"))
    reason = reason or _refuse(table, size)
    if reason is not None:
        writer.add_tokenizer_model(NO_TOKENIZER)
        return [f"the file has no tokenizer, it takes and gives token ids: {reason}"]
    model = table["model"]
    byte_level = not model.get("byte_fallback")
    writer.add_tokenizer_model("gpt2" if byte_level else "llama")
    writer.add_tokenizer_pre(SPLITS[_splits(table)] if byte_level else "default")
    texts, types = _tokens(table, size)
    writer.add_token_list(texts)
    writer.add_token_types(types)
    if not byte_level:
        writer.add_token_scores(_scores(model, texts))
        writer.add_add_space_prefix("▁" in json.dumps(_prefix(table), ensure_ascii=False))
    _add_special(writer, source.folder, size, merges=byte_level)
    return []


def _refuse(table: dict[str, Any], size: int) -> str | None:
    model = table["model"]
    if model["type"] != "BPE":
        return f"a tokenizer of the type {model['type']} is not written"
    if not model.get("byte_fallback") and _splits(table) not in SPLITS:
        return f"llama.cpp has no name for how its tokenizer cuts words, {json.dumps(table['pre_tokenizer'])[:200]}"
    ids = [*model["vocab"].values(), *(token["id"] for token in table["added_tokens"])]
    return None if max(ids) < size else f"its tokenizer knows {max(ids) + 1} tokens, the model {size}"


def _splits(table: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """The steps of a pre-tokenizer, and of each what matters."""
    step = table.get("pre_tokenizer") or {}
    steps = step.get("pretokenizers", [step] if step else [])
    return tuple((one["type"], _setting(one)) for one in steps)


def _setting(step: dict[str, Any]) -> Any:
    if step["type"] == "ByteLevel":
        return None if step.get("add_prefix_space") else step.get("use_regex", True)
    if step["type"] == "Split":
        return step["pattern"].get("Regex") if step["behavior"] == "Isolated" else None
    return step.get("individual_digits")


def _prefix(table: dict[str, Any]) -> list[Any]:
    """What a tokenizer puts before a text."""
    normal, pre = table.get("normalizer") or {}, table.get("pre_tokenizer") or {}
    steps = normal.get("normalizers", [normal])
    ahead = [step.get("prepend") for step in steps if step.get("type") == "Prepend"]
    meta = pre.get("type") == "Metaspace" and pre.get("prepend_scheme", "always") != "never"
    return [*ahead, *(["▁"] if meta else [])]


def _tokens(table: dict[str, Any], size: int) -> tuple[list[str], list[TokenType]]:
    """Text and kind of every row of the embeddings; rows without a token get a name."""
    model = table["model"]
    texts = [f"[PAD{index}]" for index in range(size)]
    types = [TokenType.UNUSED] * size
    for text, index in model["vocab"].items():
        texts[index], types[index] = text, TokenType.NORMAL
        if model.get("byte_fallback") and len(text) == len("<0x00>") and text.startswith("<0x"):
            types[index] = TokenType.BYTE
    for token in table["added_tokens"]:
        texts[token["id"]] = token["content"]
        types[token["id"]] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    if model.get("byte_fallback") and model.get("unk_token") in model["vocab"]:
        types[model["vocab"][model["unk_token"]]] = TokenType.UNKNOWN
    return texts, types


def _scores(model: dict[str, Any], texts: list[str]) -> list[float]:
    """Scores by which llama.cpp joins the pair first that stands first among the merges."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(model["merges"]):
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        ranks.setdefault(left + right, rank)
    return [-float(ranks.get(text, 0)) for text in texts]


def _add_special(writer: GGUFWriter, folder: Path, size: int, *, merges: bool) -> None:
    """Merges, special tokens, the chat template; and which of them the tokenizer itself puts around a text."""
    from transformers import AutoTokenizer

    special = gguf.SpecialVocab(folder, load_merges=merges, n_vocab=size)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    bare, whole = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
    special.add_special_token["bos"] = whole[: -len(bare)] == [tokenizer.bos_token_id]
    special.add_special_token["eos"] = whole[len(bare) :] == [tokenizer.eos_token_id]
    special.add_to_gguf(writer, quiet=True)
