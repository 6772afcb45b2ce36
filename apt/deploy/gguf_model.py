"""A plain decoder as llama.cpp has it: the settings and the tensors of a file, and why some models cannot be said.

llama.cpp's loaders, one file an architecture in its src/models, say what each reads; what differs from transformers is
written into the weights: the scale of scores, the order of rotated rows, 1 + w of Gemma's norms.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from apt.deploy.gguf_archs import ARCHS, Layout, layout_of
from apt.deploy.gguf_blocks import Block, HeadShape, pad_block, read_blocks
from apt.families import Anatomy, base_model

OUTER = {  # names in the base model -> tensors
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "wte": "token_embd",
    "wpe": "position_embd",
    "ln_f": "output_norm",
}
ROLES = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output", "gate": "ffn_gate", "up": "ffn_up"}
TENSORS = {**ROLES, "down": "ffn_down"}
LARGEST = {"gemma2": 46, "gemma3": 62}  # layers of the 27B model, by which llama.cpp chooses how it scales scores


@dataclass
class Decoder:
    """A model and how it is written.

    Args:
        model: plain, with one stack of layers.
        anatomy: of it.
    """

    model: Any
    anatomy: Anatomy

    @cached_property
    def _read(self) -> tuple[list[Block], HeadShape, set[str]]:
        return read_blocks(self.anatomy, list(ARCHS[self.config.model_type][0].norms))

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def blocks(self) -> list[Block]:
        """The layers as they are."""
        return self._read[0]

    @property
    def shape(self) -> HeadShape:
        """What all heads have in common."""
        return self._read[1]

    @property
    def hidden(self) -> int:
        """Width of the stream, from the weights."""
        return int(self.model.get_input_embeddings().weight.shape[1])

    @cached_property
    def own_head(self) -> Tensor | None:
        """Weight of the head ``[V, D]``; None where it is the embedding, as llama.cpp has that."""
        head, embedding = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        same = head.weight is embedding.weight and self._embedding_scale == 1
        return None if same else head.weight.detach().float()

    @cached_property
    def layout(self) -> Layout:
        """Raises ValueError as `layout_of`."""
        tied = self.own_head is None
        return layout_of(self.config.model_type, self.blocks, self.shape, self.hidden, tied=tied)

    @property
    def window(self) -> int | None:
        """Tokens that a layer with a sliding window sees; None where no layer has one."""
        kinds = getattr(self.config, "layer_types", None)
        slides = kinds is None or "sliding_attention" in kinds
        return getattr(self.config, "sliding_window", None) if slides else None

    @property
    def period(self) -> int | None:
        """The number p of which every p-th layer sees everything and all others a window; None where there is none."""
        slides = [kind == "sliding_attention" for kind in self.config.layer_types]
        fits = (p for p in range(2, len(slides) + 1) if slides == [i % p < p - 1 for i in range(len(slides))])
        return next(fits, None)

    @property
    def odd_windows(self) -> bool:
        """Whether llama.cpp's loader of the architecture cannot say which layers see a window.

        gemma2 reads no pattern, and takes every second; gemma3 one number, or without a window no layer.
        """
        if self.layout.arch.name == "gemma2":
            return self.period != 2
        return self.window is not None and self.period is None

    @property
    def context(self) -> int:
        """Tokens for which the file is the model: to the end of a window that the architecture has no word for."""
        most = int(self.config.max_position_embeddings)
        return most if self.layout.arch.windows or self.window is None else min(most, self.window)

    @property
    def _embedding_scale(self) -> float:
        """By what embeddings are multiplied, over the root of the width, by which llama.cpp multiplies Gemma's."""
        scale = getattr(self.model.get_input_embeddings(), "scalar_embed_scale", None)
        return 1.0 if scale is None else float(scale) / math.sqrt(self.hidden)

    def unread(self) -> list[str]:
        """Names of numbers of the model that no tensor of a file would hold."""
        base = base_model(self.model)
        prefix = f"{self.model.base_model_prefix}." if base is not self.model else ""
        read = self._read[2] | {f"{prefix}{name}.{kind}" for name in OUTER for kind in ("weight", "bias")}
        return sorted(set(self.model.state_dict()) - read - {"lm_head.weight"})

    def _score_scale(self) -> float:
        """What llama.cpp multiplies scores with."""
        name, layers = self.layout.arch.name, len(self.blocks)
        width = self.shape.size
        if LARGEST.get(name) == layers:
            width = self.hidden // (self.layout.heads[0] * self.shape.queries)
        return float(width**-0.5)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Name and float32 numbers of every tensor of the file."""
        base, arch = base_model(self.model), self.layout.arch
        for name, tensor in OUTER.items():
            module: Any = getattr(base, name, None)
            if module is None:
                continue
            weight = module.weight.detach().float()
            if tensor == "token_embd":
                weight = weight * self._embedding_scale
            yield f"{tensor}.weight", weight + 1 if arch.unit_norms and tensor == "output_norm" else weight
            if getattr(module, "bias", None) is not None:
                yield f"{tensor}.bias", module.bias.detach().float()
        if self.own_head is not None:
            yield "output.weight", self.own_head
        if (factors := self.rope_factors()) is not None:
            yield "rope_freqs.weight", factors
        full = next(block for block in self.blocks if block.heads)
        sizes = zip(self.blocks, self.layout.heads, self.layout.neurons, strict=True)
        for index, (block, heads, neurons) in enumerate(sizes):
            padded = (
                pad_block(block, heads, neurons, full, self.shape) if heads else self._without_heads(block, neurons)
            )
            for name, numbers in self._of_block(padded, index):
                yield f"blk.{index}.{name}", numbers

    def _without_heads(self, block: Block, neurons: int) -> Block:
        """A layer whose attention is left out, with its norm."""
        attention = next(name for name, tensor in self.layout.arch.norms.items() if tensor == "attn_norm")
        kept = {role: bias for role, bias in block.biases.items() if role in ("gate", "up", "down")}
        norms = {name: norm for name, norm in block.norms.items() if name != attention}
        bare = Block(block.weights, kept, norms, 0, block.neurons)
        padded = pad_block(bare, 0, neurons, bare, self.shape)
        weights = {role: padded.weights[role] for role in ("gate", "up", "down")}
        return Block(weights, padded.biases, norms, 0, neurons)

    def _of_block(self, block: Block, index: int) -> Iterator[tuple[str, Tensor]]:
        arch = self.layout.arch
        weights, biases = dict(block.weights), dict(block.biases)
        scale = (self.shape.scale[index] or self._score_scale()) / self._score_scale()
        normed = "attn_q_norm" in arch.norms.values()
        for side in (weights, biases):
            if "q" in side and not normed:
                side["q"] = side["q"] * scale
            for role in ("q", "k"):
                if role in side and arch.pairs:
                    side[role] = in_pairs(side[role], self.shape.size)
            if arch.fused and "q" in side:
                side["qkv"] = torch.cat([side.pop(role) for role in ("q", "k", "v")])
            if arch.fused_ffn and "gate" in side:
                side["up"] = torch.cat([side.pop("gate"), side["up"]])
        for kind, side in (("weight", weights), ("bias", biases)):
            for role, tensor in side.items():
                yield f"{TENSORS.get(role, 'attn_qkv')}.{kind}", tensor
        for name, (weight, bias) in block.norms.items():
            norm = arch.norms[name]
            weight = weight + 1 if arch.unit_norms else weight
            yield f"{norm}.weight", weight * scale if norm == "attn_q_norm" else weight
            if bias is not None:
                yield f"{norm}.bias", bias

    def rope(self) -> dict[str, Any]:
        """Rotary embeddings of the layers that see everything; of GPT-2 nothing."""
        found = dict(getattr(self.config, "rope_parameters", None) or {})
        return dict(found.get("full_attention", found))

    def rope_factors(self) -> Tensor | None:
        """By what frequencies are divided where they are not the powers of one number."""
        rope = self.rope()
        if rope.get("rope_type") != "llama3":
            return None
        plain = rope["rope_theta"] ** -(torch.arange(0, self.shape.size, 2, dtype=torch.float64) / self.shape.size)
        turned: Any = base_model(self.model).get_submodule("rotary_emb")
        return (plain / turned.inv_freq.double()).float()


def in_pairs(tensor: Tensor, size: int) -> Tensor:
    """Rows in the order in which each pair that is turned together lies side by side.

    Args:
        tensor: weight or bias ``[H * size, ...]``, each head with the first of all pairs before the second.
        size: features of a head.
    """
    rest = tensor.shape[1:]
    return tensor.reshape(-1, 2, size // 2, *rest).transpose(1, 2).reshape(-1, *rest)
