"""Phi-3: Llama's shape with q, k, v in one projection, and gate, up in another.

Its attention cuts the answer of the first by the head counts of the model's config and its own.
"""

from apt.families.base import FFN, Attention, Family, Stack

PHI3 = Family(
    model_types=("phi3",),
    stacks=(
        Stack(
            layers="layers",
            parts=(
                Attention(
                    "self_attn",
                    q=".qkv_proj.q",
                    k=".qkv_proj.k",
                    v=".qkv_proj.v",
                    o=".o_proj",
                    fused=".qkv_proj",
                    per_head=("config.num_attention_heads", "num_key_value_heads"),
                    settings=("num_attention_heads", "num_key_value_heads"),
                ),
                FFN(
                    gate="mlp.gate_up_proj.gate",
                    up="mlp.gate_up_proj.up",
                    act="mlp.activation_fn",
                    down="mlp.down_proj",
                    fused="mlp.gate_up_proj",
                ),
            ),
            decoder=True,
        ),
    ),
    default_targets=("q", "v"),
)
