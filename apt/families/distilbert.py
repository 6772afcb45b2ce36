"""DistilBERT: a post-norm encoder whose attention module holds its output projection."""

from apt.families.base import FFN, Attention, Family, Stack

DISTILBERT = Family(
    model_types=("distilbert",),
    stacks=(
        Stack(
            layers="transformer.layer",
            parts=(
                Attention("attention", q=".q_lin", k=".k_lin", v=".v_lin", o=".out_lin"),
                FFN(up="ffn.lin1", down="ffn.lin2", setting="hidden_dim"),
            ),
        ),
    ),
    default_targets=("q", "v", "up"),
)
