"""GPT-2: a pre-norm decoder with learned positions, whose linears are `Conv1D` and whose q, k, v are one of them.

Its attention cuts that one's answer into pieces of `split_size`. The scale of its scores is fixed when the model is
made (`scale_attn_weights`, `scale_attn_by_inverse_layer_idx`) and stays as heads go.
"""

from typing import Any

from torch import Tensor, nn

from apt.families.base import FFN, Attention, Family, Stack
from apt.families.empty import EmptyAttention


class EmptyGPT2Attention(EmptyAttention):
    """The output projection's bias goes through the dropout inside the attention, as it did before."""

    def __init__(self, attention: nn.Module, out: nn.Module | None = None, weights: str = "attentions") -> None:
        super().__init__(attention, out, weights)
        self.resid_dropout = attention.get_submodule("resid_dropout")

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        self.place.pass_by(hidden_states, kwargs.get("past_key_values"))
        return self.resid_dropout(self.output(hidden_states)), None


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
