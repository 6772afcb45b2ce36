"""Llama, Mistral, Qwen2 and Qwen3: pre-norm decoders with grouped-query attention and a gated FFN.

Qwen3 also norms q and k, per head dimension: the norm is shared by all heads and stays whole when heads go.
"""

from apt.families.base import FFN, Attention, Family, Stack

LLAMA = Family(
    model_types=("llama", "mistral", "qwen2", "qwen3"),
    stacks=(
        Stack(
            layers="layers",
            parts=(
                Attention(
                    "self_attn",
                    q=".q_proj",
                    k=".k_proj",
                    v=".v_proj",
                    o=".o_proj",
                    settings=("num_attention_heads", "num_key_value_heads"),
                ),
                FFN(up="mlp.up_proj", gate="mlp.gate_proj", act="mlp.act_fn", down="mlp.down_proj"),
            ),
            decoder=True,
        ),
    ),
    default_targets=("q", "v"),
)
