"""Llama, Mistral, Qwen2 and Qwen3: pre-norm decoders with grouped-query attention and a gated FFN.

Qwen3 also norms q and k, per head dimension: the norm is shared by all heads and stays whole when heads go.
"""

from apt.families.base import Family

LLAMA = Family(
    model_types=("llama", "mistral", "qwen2", "qwen3"),
    layers="layers",
    linears={
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
        "up": "mlp.up_proj",
        "gate": "mlp.gate_proj",
        "down": "mlp.down_proj",
    },
    attention="self_attn",
    attention_holds_o=True,
    default_targets=("q", "v"),
    decoder=True,
)
