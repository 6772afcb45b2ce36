"""DeBERTa v2 and v3: BERT's shape; its attention counts its heads, and q and k also project the relative positions.

Those positions are cut with the heads only where they go through q and k (`share_att_key`, as in the released models);
projections of their own for them would have to be cut too, so such a config is refused.
"""

from apt.families.base import Family

DEBERTA = Family(
    model_types=("deberta-v2",),
    layers="encoder.layer",
    linears={
        "q": "attention.self.query_proj",
        "k": "attention.self.key_proj",
        "v": "attention.self.value_proj",
        "o": "attention.output.dense",
        "up": "intermediate.dense",
        "down": "output.dense",
    },
    attention="attention.self",
    attention_holds_o=False,
    default_targets=("q", "v", "up"),
    decoder=False,
    per_head=("num_attention_heads",),
    needs=(("share_att_key", True),),
)
