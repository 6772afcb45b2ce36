"""DistilBERT: a post-norm encoder whose attention module holds its output projection."""

from apt.families.base import Family

DISTILBERT = Family(
    model_types=("distilbert",),
    layers="transformer.layer",
    linears={
        "q": "attention.q_lin",
        "k": "attention.k_lin",
        "v": "attention.v_lin",
        "o": "attention.out_lin",
        "up": "ffn.lin1",
        "down": "ffn.lin2",
    },
    attention="attention",
    attention_holds_o=True,
    default_targets=("q", "v", "up"),
    decoder=False,
)
