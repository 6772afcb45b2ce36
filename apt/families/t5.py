"""T5 and mT5: an encoder and a decoder, and one relative bias for all layers of each.

Its table stays whole, also where the first layer of an encoder has no heads left; so the first layer of a stack never
goes as a whole.
"""

from dataclasses import replace

from apt.families.base import FFN, Attention, Family, Stack
from apt.families.t5_heads import EmptyT5Attention, WholeBias

_SELF = Attention(
    "layer.0.SelfAttention",
    q=".q",
    k=".k",
    v=".v",
    o=".o",
    per_head=("n_heads",),
    empty=EmptyT5Attention,
    follow=WholeBias,
)
_CROSS = replace(_SELF, module="layer.1.EncDecAttention", cross=True)
_BIASES = ("position_bias", "encoder_decoder_position_bias")  # which a block hands on


def _family(gated: bool) -> Family:
    encoder, decoder = (f"layer.{place}.DenseReluDense" for place in (1, 2))

    def ffn(place: str) -> FFN:
        if gated:
            return FFN(gate=f"{place}.wi_0", up=f"{place}.wi_1", down=f"{place}.wo", setting="d_ff")
        return FFN(up=f"{place}.wi", down=f"{place}.wo", setting="d_ff")

    return Family(
        model_types=("t5", "mt5"),
        stacks=(
            Stack(
                name="encoder",
                layers="encoder.block",
                parts=(_SELF, ffn(encoder)),
                setting="num_layers",
                behind=_BIASES,
                first_stays=True,
            ),
            Stack(
                name="decoder",
                layers="decoder.block",
                parts=(_SELF, _CROSS, ffn(decoder)),
                decoder=True,
                setting="num_decoder_layers",
                behind=_BIASES,
                first_stays=True,
            ),
        ),
        default_targets=("q", "v", "gate" if gated else "up"),
        needs=(("is_gated_act", gated),),
    )


T5, T5_GATED = _family(gated=False), _family(gated=True)
