"""GPT-2: a pre-norm decoder with learned positions, whose linears are `Conv1D` and whose q, k, v are one of them.

Its attention cuts that one's answer into pieces of `split_size`. The scale of its scores is fixed when the model is
made (`scale_attn_weights`, `scale_attn_by_inverse_layer_idx`) and stays as heads go.
"""

from apt.families.base import FFN, Attention, Family, Stack
from apt.families.empty import EmptyGPT2Attention

GPT2 = Family(
    model_types=("gpt2",),
    stacks=(
        Stack(
            layers="h",
            parts=(
                Attention(
                    "attn",
                    q=".c_attn.q",
                    k=".c_attn.k",
                    v=".c_attn.v",
                    o=".c_proj",
                    fused=".c_attn",
                    per_head=("num_heads", "split_size"),
                    empty=EmptyGPT2Attention,
                ),
                FFN(up="mlp.c_fc", down="mlp.c_proj", setting="n_inner"),
            ),
            decoder=True,
        ),
    ),
    default_targets=("q", "v"),
    layers_need=(("scale_attn_by_inverse_layer_idx", False),),  # by the number that an export would give it anew
)
