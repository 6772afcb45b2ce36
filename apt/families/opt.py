"""OPT: a decoder with learned positions, pre-norm or post-norm, whose attention counts its heads in `num_heads`.

Its FFN runs on tokens flattened to ``[B * S, D]``; the masks fit the padding mask to that.
"""

from apt.families.base import FFN, Attention, Family, Stack

OPT = Family(
    model_types=("opt",),
    stacks=(
        Stack(
            layers="decoder.layers",
            parts=(
                Attention("self_attn", q=".q_proj", k=".k_proj", v=".v_proj", o=".out_proj", per_head=("num_heads",)),
                FFN(up="fc1", down="fc2", setting="ffn_dim"),
            ),
            decoder=True,
        ),
    ),
    default_targets=("q", "v"),
)
