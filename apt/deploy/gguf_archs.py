"""The architectures of llama.cpp that a decoder of a known family is written as: one line each, and which one fits.

Where a layer's sizes may differ, those of `free` read an array of them (src/models/deci.cpp, openelm.cpp); the others
read the sizes of the first layer for all, so that what is smaller is padded.
"""

from dataclasses import dataclass, field

from apt.deploy.gguf_blocks import Block, HeadShape

PRE = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
QK = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
SANDWICH = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
SILU, TANH = ("silu", "swish"), ("gelu_pytorch_tanh", "gelu_new")
QKV, ALL = ("q", "k", "v"), ("q", "k", "v", "o", "gate", "up", "down")
LEAST_NEURONS = 32  # of a layer that has none and must have some: what the blocks of most number types divide


@dataclass(frozen=True)
class Arch:
    """One architecture.

    Args:
        name: as its files say it.
        norms: name in a layer of transformers -> tensor of a block.
        acts: activations that its FFN may have.
        biases: roles that may have a bias.
        pairs: whether rotary embeddings turn neighbours, so that rows of q and k take another order.
        free: whether each layer has sizes of its own.
        least_heads: KV heads that a layer must have; where 0, it is written without its norm.
        tied: whether its head is the embedding.
        fused: whether q, k, v are one tensor.
        fused_ffn: whether gate and up are one tensor.
        square: whether its attention is as wide as the stream.
        factors: whether it reads `rope_freqs`.
        windows: whether it knows layers that see a window.
        partial: whether a part of a head may be turned.
        unit_norms: whether its norms multiply by 1 + w in transformers.
    """

    name: str
    norms: dict[str, str] = field(default_factory=lambda: dict(PRE))
    acts: tuple[str, ...] = SILU
    biases: tuple[str, ...] = ()
    pairs: bool = False
    free: bool = False
    least_heads: int = 1
    tied: bool = False
    fused: bool = False
    fused_ffn: bool = False
    square: bool = False
    factors: bool = False
    windows: bool = False
    partial: bool = False
    unit_norms: bool = False


LLAMA = Arch("llama", biases=ALL, pairs=True, factors=True)
DECI = Arch("deci", biases=ALL, pairs=True, factors=True, free=True, least_heads=0)
QWEN2 = Arch("qwen2", biases=QKV, square=True)
QWEN3 = Arch("qwen3", norms={**PRE, **QK})
OPENELM = Arch("openelm", norms={**PRE, **QK}, fused=True, free=True, tied=True)
GEMMA2 = Arch("gemma2", norms=SANDWICH, acts=TANH, windows=True, tied=True, unit_norms=True)
GEMMA3 = Arch("gemma3", norms={**SANDWICH, **QK}, acts=TANH, windows=True, unit_norms=True)
PHI3 = Arch("phi3", fused=True, fused_ffn=True, square=True, partial=True)
GPT2 = Arch("gpt2", {"ln_1": "attn_norm", "ln_2": "ffn_norm"}, TANH, ALL, fused=True, square=True)

ARCHS: dict[str, tuple[Arch, ...]] = {  # model_type -> what says it, the first where all layers are alike
    "llama": (LLAMA, DECI),
    "mistral": (LLAMA, DECI),
    "qwen2": (QWEN2, DECI),
    "qwen3": (QWEN3, OPENELM),
    "gemma2": (GEMMA2,),
    "gemma3_text": (GEMMA3,),
    "phi3": (PHI3,),
    "gpt2": (GPT2,),
}


@dataclass(frozen=True)
class Layout:
    """How a model is written.

    Args:
        arch: the architecture.
        heads: KV heads of each layer, padding included.
        neurons: the same of its FFN.
    """

    arch: Arch
    heads: list[int]
    neurons: list[int]


def layout_of(kind: str, blocks: list[Block], shape: HeadShape, hidden: int, *, tied: bool) -> Layout:
    """The architecture that says these layers with the fewest zeros.

    Args:
        kind: `model_type` of the config.
        blocks: the layers.
        shape: of their heads.
        hidden: width of the stream.
        tied: whether the head is the embedding.

    Raises:
        ValueError: none can say them.
    """
    uniform, *free = ARCHS[kind]
    counts = {(block.heads, block.neurons) for block in blocks}
    most = max(block.heads for block in blocks)
    wide, rest = divmod(hidden, shape.queries * shape.size)
    fits = not uniform.square or (most == wide and not rest)
    alike = fits and len(counts) == 1 and min(*counts.pop()) > 0
    for arch in free:
        if not alike and (tied or not arch.tied):
            heads = [_heads_of(arch, block) for block in blocks]
            return Layout(arch, heads, [block.neurons or LEAST_NEURONS for block in blocks])
    if uniform.square:
        if rest or wide < most:
            raise ValueError(
                f"the attention of {uniform.name} is as wide as the stream there, and no number of heads of "
                f"{shape.size} features is {hidden}"
            )
        most = wide
    neurons = max(block.neurons for block in blocks) or LEAST_NEURONS
    return Layout(uniform, [most] * len(blocks), [neurons] * len(blocks))


def _heads_of(arch: Arch, block: Block) -> int:
    # Without heads there is no place for what the output bias adds: one head of zeros keeps it.
    kept = "o" in block.biases and bool(block.biases["o"].any())
    return block.heads or max(arch.least_heads, int(kept))
