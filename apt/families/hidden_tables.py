"""Where each family keeps its hidden dimensions: one table a shape, as `Family` is one for heads and neurons.

Every part that writes, norms or reads the residual stream is named; what a table leaves out and is as wide as the
stream makes the pruning of hidden dimensions refuse the model. Names outside the layers are looked up in the base model
first, then in the model with its task head; those that a model does not have are passed over.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn


@dataclass(frozen=True, kw_only=True)
class HiddenTable:
    """The parts of one shape of a family.

    Args:
        model_types: values of ``config.model_type``.
        when: settings of the config that tell this shape from another of the same type.
        needs: settings without which a dimension cannot be removed exactly.
        norms: of a layer, whose output goes on in the stream: weighted statistics and no mask.
        read_norms: of a layer, whose output is only read: the mask is folded in.
        reads: modules of a layer whose first argument is read from an unmasked stream: they mask it.
        norm_offset: added to the weight of an RMSNorm (Gemma: 1).
        constant: what the family computes from the original width, and keeps; a config cannot tell the two apart.
        embeddings, base_norms, base_read_norms: the same outside the layers.
        silent_norms: outside the layers, masked without being a site of statistics.
        inputs: linears outside the layers whose columns are hidden dimensions.
        masked_inputs: the same, reading an unmasked stream.
        outputs: linears whose rows are.
        unless: a part that is none where another module is there.
        others: of the stream's width and no part of it.
    """

    model_types: tuple[str, ...]
    when: dict[str, object] = field(default_factory=dict)
    needs: dict[str, object] = field(default_factory=dict)
    norms: tuple[str, ...] = ()
    read_norms: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    norm_offset: float = 0.0
    constant: str = ""
    embeddings: tuple[str, ...] = ()
    base_norms: tuple[str, ...] = ()
    base_read_norms: tuple[str, ...] = ()
    silent_norms: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    masked_inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    unless: dict[str, str] = field(default_factory=dict)
    others: tuple[str, ...] = ()


HEADS = ("qa_outputs", "classifier", "classifier.dense")  # of encoders; they read what the last norm left unmasked
BERT = HiddenTable(
    model_types=("bert", "roberta"),
    norms=("attention.output.LayerNorm", "output.LayerNorm"),
    reads=("attention.self", "intermediate.dense"),
    embeddings=tuple(f"embeddings.{kind}_embeddings" for kind in ("word", "position", "token_type")),
    base_norms=("embeddings.LayerNorm",),
    base_read_norms=("cls.predictions.transform.LayerNorm", "lm_head.layer_norm"),
    masked_inputs=(*HEADS, "pooler.dense", "cls.predictions.transform.dense", "lm_head.dense"),
    outputs=("cls.predictions.transform.dense", "lm_head.dense"),
    inputs=("cls.predictions.decoder", "lm_head.decoder"),
    unless={"classifier": "pooler.dense"},
    others=("cls.seq_relationship", "classifier.out_proj"),
)
DEBERTA = HiddenTable(
    model_types=("deberta-v2",),
    # Without a norm the positions would reach q and k unmasked; a convolution would need its channels cut.
    needs={"norm_rel_ebd": "layer_norm", "conv_kernel_size": 0},
    norms=BERT.norms,
    reads=BERT.reads,
    embeddings=(*BERT.embeddings, "encoder.rel_embeddings"),
    base_norms=BERT.base_norms,
    silent_norms=("encoder.LayerNorm",),  # of the relative positions, which are no tokens
    masked_inputs=(*HEADS, "pooler.dense"),
    outputs=("embeddings.embed_proj",),
    unless={"classifier": "pooler.dense", **dict.fromkeys(BERT.embeddings, "embeddings.embed_proj")},
)
DISTILBERT = HiddenTable(
    model_types=("distilbert",),
    norms=("sa_layer_norm", "output_layer_norm"),
    reads=("attention", "ffn.lin1"),
    embeddings=("embeddings.word_embeddings", "embeddings.position_embeddings"),
    base_norms=("embeddings.LayerNorm",),
    base_read_norms=("vocab_layer_norm",),
    masked_inputs=("pre_classifier", "classifier", "qa_outputs", "vocab_transform"),
    outputs=("vocab_transform",),
    inputs=("vocab_projector",),
    unless={"classifier": "pre_classifier"},
)
LLAMA = HiddenTable(
    model_types=("llama", "mistral", "qwen2", "qwen3"),
    read_norms=("input_layernorm", "post_attention_layernorm"),
    embeddings=("embed_tokens",),
    base_read_norms=("norm",),
    inputs=("lm_head", "score", "qa_outputs"),
)
PHI3 = replace(LLAMA, model_types=("phi3",), inputs=("lm_head", "score"))
GPT2 = HiddenTable(
    model_types=("gpt2",),
    read_norms=("ln_1", "ln_2"),
    embeddings=("wte", "wpe"),
    base_read_norms=("ln_f",),
    inputs=("lm_head", "score", "classifier", "qa_outputs"),
)
GEMMA = HiddenTable(
    model_types=("gemma2", "gemma3_text"),
    norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    read_norms=("input_layernorm", "pre_feedforward_layernorm"),
    norm_offset=1.0,
    constant="the scale of the embeddings",
    embeddings=("embed_tokens",),
    base_read_norms=("norm",),
    inputs=("lm_head", "score"),
)
T5 = HiddenTable(
    model_types=("t5", "mt5"),
    read_norms=tuple(f"layer.{place}.layer_norm" for place in range(3)),
    constant="the scale of the logits",
    embeddings=("shared", "encoder.embed_tokens", "decoder.embed_tokens"),
    base_read_norms=("encoder.final_layer_norm", "decoder.final_layer_norm"),
    inputs=("lm_head", "classification_head.dense", "classifier", "qa_outputs"),
    others=("classification_head.out_proj",),
)
OPT_UNLESS = {
    "decoder.embed_tokens": "decoder.project_in",
    "lm_head": "decoder.project_out",
    "score": "decoder.project_out",
    "qa_outputs": "decoder.project_out",
}
OPT = HiddenTable(
    model_types=("opt",),
    when={"do_layer_norm_before": True},
    needs={"_remove_final_layer_norm": False, "layer_norm_elementwise_affine": True},
    read_norms=("self_attn_layer_norm", "final_layer_norm"),
    embeddings=("decoder.embed_tokens", "decoder.embed_positions"),
    base_read_norms=("decoder.final_layer_norm",),
    inputs=("lm_head", "score", "qa_outputs", "decoder.project_out"),
    outputs=("decoder.project_in",),
    unless=OPT_UNLESS,
)
OPT_POST = HiddenTable(
    model_types=("opt",),
    when={"do_layer_norm_before": False},
    needs={"layer_norm_elementwise_affine": True},
    norms=OPT.read_norms,
    reads=("self_attn", "fc1"),
    embeddings=OPT.embeddings,
    masked_inputs=OPT.inputs,
    outputs=OPT.outputs,
    unless=OPT_UNLESS,
)
TABLES = (BERT, DEBERTA, DISTILBERT, GEMMA, GPT2, LLAMA, OPT, OPT_POST, PHI3, T5)


def hidden_table(model: nn.Module) -> HiddenTable:
    """The table of a model.

    Raises:
        ValueError: no table knows its type, or its config lacks what the table needs.
    """
    config: Any = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    for table in TABLES:
        if model_type in table.model_types and all(getattr(config, key) == value for key, value in table.when.items()):
            for name, value in table.needs.items():
                found = getattr(config, name, value if isinstance(value, int) else None)
                if found != value:
                    raise ValueError(f"hidden dimensions of {model_type} with {name}={found!r} cannot be removed")
            return table
    known = ", ".join(sorted({name for table in TABLES for name in table.model_types}))
    raise ValueError(f"hidden dimensions of model_type {model_type!r} cannot be removed; known are {known}")
