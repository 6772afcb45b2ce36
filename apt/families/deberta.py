"""DeBERTa v2 and v3: BERT's shape; its attention counts its heads, and q and k also project the relative positions.

Those positions are cut with the heads only where they go through q and k (`share_att_key`, as in the released models);
projections of their own for them would have to be cut too, so such a config is refused.
"""

from apt.families.base import FFN, Attention, Family, Stack

_ATTENTION = Attention(
    "attention.self",
    q=".query_proj",
    k=".key_proj",
    v=".value_proj",
    o="attention.output.dense",
    per_head=("num_attention_heads",),
)
DEBERTA = Family(
    model_types=("deberta-v2",),
    stacks=(
        Stack(
            layers="encoder.layer",
            parts=(_ATTENTION, FFN(up="intermediate.dense", down="output.dense")),
            behind=(None,),  # the attention weights
        ),
    ),
    default_targets=("q", "v", "up"),
    needs=(("share_att_key", True),),
    layers_need=(("conv_kernel_size", 0),),  # the convolution stands behind the first layer, whichever that is
)
