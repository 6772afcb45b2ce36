"""Models of known shape with random weights, and a batch for each: what benchmarks run on without a real model."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """A model of a published size. `layers` are measured; the whole model has `of` of them."""

    build: Callable[[int], nn.Module]  # layers -> model
    targets: tuple[str, ...]  # roles that get an adapter
    batch: int
    tokens: int  # of each sequence
    layers: int
    of: int
    language_model: bool = False

    def model(self, layers: int | None = None, device: str = "cpu") -> nn.Module:
        torch.manual_seed(0)
        with torch.device(device):
            return self.build(layers or self.layers)

    def inputs(self, model: nn.Module, device: str = "cpu") -> dict[str, Tensor]:
        """A batch without padding, labels included."""
        config: Any = model.config
        size = (self.batch, self.tokens)
        ids = torch.randint(5, config.vocab_size, size, generator=torch.Generator().manual_seed(0)).to(device)
        writes = self.language_model or config.is_encoder_decoder
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids if writes else ids[:, 0] % 2}


def _bert(hidden: int, heads: int, vocab: int = 30522) -> Callable[[int], nn.Module]:
    def build(layers: int) -> nn.Module:
        from transformers import BertConfig, BertForSequenceClassification

        sizes = {"hidden_size": hidden, "num_attention_heads": heads, "intermediate_size": 4 * hidden}
        return BertForSequenceClassification(BertConfig(**sizes, num_hidden_layers=layers, vocab_size=vocab))

    return build


def _deberta(hidden: int, heads: int, vocab: int = 128100) -> Callable[[int], nn.Module]:
    """DeBERTa-v3: disentangled attention with shared keys, no positions added to the embeddings."""

    def build(layers: int) -> nn.Module:
        from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

        sizes = {"hidden_size": hidden, "num_attention_heads": heads, "intermediate_size": 4 * hidden}
        positions = {"relative_attention": True, "position_buckets": 256, "norm_rel_ebd": "layer_norm"}
        positions |= {"share_att_key": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
        config = DebertaV2Config(**sizes, **positions, num_hidden_layers=layers, vocab_size=vocab, type_vocab_size=0)
        return DebertaV2ForSequenceClassification(config)

    return build


def _llama(hidden: int, heads: int, groups: int, neurons: int, vocab: int) -> Callable[[int], nn.Module]:
    def build(layers: int) -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes = {"hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": groups}
        sizes |= {"intermediate_size": neurons, "vocab_size": vocab, "num_hidden_layers": layers}
        return LlamaForCausalLM(LlamaConfig(**sizes, use_cache=False))

    return build


def _t5(hidden: int, heads: int, neurons: int, vocab: int = 32128) -> Callable[[int], nn.Module]:
    def build(layers: int) -> nn.Module:
        from transformers import T5Config, T5ForConditionalGeneration

        sizes = {"d_model": hidden, "num_heads": heads, "d_kv": hidden // heads, "d_ff": neurons, "vocab_size": vocab}
        tokens = {"decoder_start_token_id": 0, "pad_token_id": 0, "use_cache": False}
        return T5ForConditionalGeneration(T5Config(**sizes, **tokens, num_layers=layers))

    return build


ENCODER, DECODER = ("q", "v", "up"), ("q", "v")
EVERY_LINEAR = ("q", "k", "v", "o", "gate", "up", "down")
CPU_SHAPES = {
    "minilm": Shape(_bert(384, 12), (*ENCODER, "down"), batch=32, tokens=27, layers=6, of=6),
    "bert-base": Shape(_bert(768, 12), ENCODER, batch=16, tokens=64, layers=3, of=12),
    "t5-base": Shape(_t5(768, 12, 3072), ENCODER, batch=8, tokens=32, layers=2, of=12),  # of encoder and decoder each
    "smollm2-135m": Shape(_llama(576, 9, 3, 1536, 8192), DECODER, 4, 128, layers=4, of=30, language_model=True),
    "llama-2-7b": Shape(_llama(4096, 32, 32, 11008, 32000), DECODER, 1, 128, layers=1, of=32, language_model=True),
    "deberta-v3-base": Shape(_deberta(768, 12), ENCODER, batch=8, tokens=64, layers=3, of=12),
}
GPU_SHAPES = {  # what a GPU is bought for, and a small model, whose step the host is too slow for
    "llama-2-7b, 4 x 2048": Shape(
        _llama(4096, 32, 32, 11008, 32000), EVERY_LINEAR, 4, 2048, layers=4, of=32, language_model=True
    ),
    "bert-base, 32 x 128": Shape(_bert(768, 12), ENCODER, batch=32, tokens=128, layers=12, of=12),
}
TOY_SHAPES = {  # for rehearsals
    "toy llama": Shape(_llama(32, 4, 2, 64, 50), EVERY_LINEAR, 2, 8, layers=2, of=2, language_model=True),
    "toy bert": Shape(_bert(32, 4, vocab=50), ENCODER, batch=2, tokens=8, layers=2, of=2),
}
SHAPES = CPU_SHAPES | GPU_SHAPES | TOY_SHAPES
