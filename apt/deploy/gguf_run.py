"""A file run in llama.cpp, through the package cyllama: logits, greedy text, tokens; and its own quantiser."""

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from cyllama.llama import llama_cpp
from torch import Tensor

F32 = 0  # ggml_type; keys and values of the cache are float16 by default
NO_FLASH = 0  # llama_flash_attn_type


class _Model(llama_cpp.LlamaModel):  # type: ignore[misc]  # of no known type
    @property
    def n_vocab(self) -> int:
        """What cyllama 0.2.18 asks its model for when it reads logits, and does not have."""
        return int(self.get_vocab().n_vocab)


class LlamaCpp:
    """A model in llama.cpp, with a cache in float32.

    Args:
        path: the file.
        context: tokens of the cache.

    Raises:
        ValueError: llama.cpp cannot load the file.
    """

    program = f"llama.cpp by cyllama {version('cyllama')}"

    def __init__(self, path: Path, context: int) -> None:
        llama_cpp.disable_logging()
        llama_cpp.ggml_backend_load_all()
        llama_cpp.llama_backend_init()
        settings = llama_cpp.LlamaModelParams()
        settings.n_gpu_layers = 0
        self.model = _Model(str(path), settings)
        settings = llama_cpp.LlamaContextParams()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = context
        settings.type_k = settings.type_v = F32
        settings.flash_attn_type = NO_FLASH
        settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
        self.run = llama_cpp.LlamaContext(self.model, settings)
        self.read = 0

    def fresh(self) -> None:
        """Forget the tokens that were read."""
        self.run.kv_cache_clear()
        self.read = 0

    @property
    def has_tokenizer(self) -> bool:
        """Whether the file has one; LLAMA_VOCAB_TYPE_NONE is 0."""
        return int(self.model.get_vocab().vocab_type) != 0

    def feed(self, ids: Sequence[int], *, every: bool = False) -> None:
        """Read the next tokens.

        Args:
            ids: the tokens.
            every: whether logits are computed behind each, or behind the last alone.
        """
        batch = llama_cpp.LlamaBatch(n_tokens=len(ids), embd=0, n_seq_max=1)
        for place, token in enumerate(ids):
            batch.add(int(token), self.read + place, [0], every or place + 1 == len(ids))
        self.run.decode(batch)
        self.run.synchronize()
        self.read += len(ids)

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Logits ``[T, V]`` behind each of the next tokens."""
        self.feed(ids, every=True)
        return torch.tensor([self.run.get_logits_ith(place) for place in range(len(ids))])

    def greedy(self, ids: Sequence[int], tokens: int, ends: Sequence[int]) -> list[int]:
        """The likeliest next tokens, one by one; never one that ends the text."""
        self.fresh()
        self.feed(ids)
        made: list[int] = []
        while len(made) < tokens:
            last = torch.tensor(self.run.get_logits_ith(-1))
            last[list(ends)] = -torch.inf
            made.append(int(last.argmax()))
            self.feed(made[-1:])
        return made

    def tokens(self, text: str) -> list[int]:
        """Cut a text into tokens, with those that its tokenizer puts around it."""
        found = self.model.get_vocab().tokenize(text, add_special=True, parse_special=True)
        return [int(token) for token in found]
