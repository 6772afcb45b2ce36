"""BERT and RoBERTa: post-norm encoders whose attention module ends before the output projection."""

from apt.families.base import Family

BERT = Family(
    model_types=("bert", "roberta"),
    layers="encoder.layer",
    linears={
        "q": "attention.self.query",
        "k": "attention.self.key",
        "v": "attention.self.value",
        "o": "attention.output.dense",
        "up": "intermediate.dense",
        "down": "output.dense",
    },
    attention="attention.self",
    attention_holds_o=False,
    default_targets=("q", "v", "up"),
    decoder=False,
)
