"""BERT and RoBERTa: post-norm encoders whose attention module ends before the output projection."""

from apt.families.base import FFN, Attention, Family, Stack

BERT = Family(
    model_types=("bert", "roberta"),
    stacks=(
        Stack(
            layers="encoder.layer",
            parts=(
                Attention("attention.self", q=".query", k=".key", v=".value", o="attention.output.dense"),
                FFN(up="intermediate.dense", down="output.dense"),
            ),
        ),
    ),
    default_targets=("q", "v", "up"),
)
