"""OPT: a decoder with learned positions, pre-norm or post-norm, whose attention counts its heads in `num_heads`.

Its FFN runs on tokens flattened to ``[B * S, D]``; the gates fit the padding mask to that.
"""

from apt.families.base import Family

OPT = Family(
    model_types=("opt",),
    layers="decoder.layers",
    linears={
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.out_proj",
        "up": "fc1",
        "down": "fc2",
    },
    attention="self_attn",
    attention_holds_o=True,
    default_targets=("q", "v"),
    decoder=True,
    per_head=("num_heads",),
)
