"""Where each family keeps its hidden dimensions: one table a shape, as `Family` is one for heads and neurons.

Every part that writes, norms or reads the residual stream is named; what a table leaves out and is as wide as the
stream makes the pruning of hidden dimensions refuse the model. Names outside the layers are looked up in the base model
first, then in the model with its task head; those that a model does not have are passed over.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from apt.families.base import Attention, Family, Layer, base_model
from apt.families.empty import EmptyAttention


@dataclass(frozen=True, kw_only=True)
class HiddenTable:
    """The parts of one shape of a family.

    Args:
        model_types: values of ``config.model_type``.
        when: settings of the config that tell this shape from another of the same type.
        needs: settings without which a dimension cannot be removed exactly.
        norms: of a layer, whose output goes on in the stream: weighted statistics and no gate.
        read_norms: of a layer, whose output is only read: the gate is folded in.
        reads: modules of a layer whose first argument is read from an ungated stream: they gate it.
        norm_offset: added to the weight of an RMSNorm (Gemma: 1).
        constant: what the family computes from the original width, and keeps; a config cannot tell the two apart.
        embeddings, base_norms, base_read_norms: the same outside the layers.
        silent_norms: outside the layers, gated without being a site of statistics.
        inputs: linears outside the layers whose columns are hidden dimensions.
        gated_inputs: the same, reading an ungated stream.
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
    gated_inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    unless: dict[str, str] = field(default_factory=dict)
    others: tuple[str, ...] = ()


HEADS = ("qa_outputs", "classifier", "classifier.dense")  # of encoders; they read what the last norm left ungated
BERT = HiddenTable(
    model_types=("bert", "roberta"),
    norms=("attention.output.LayerNorm", "output.LayerNorm"),
    reads=("attention.self", "intermediate.dense"),
    embeddings=tuple(f"embeddings.{kind}_embeddings" for kind in ("word", "position", "token_type")),
    base_norms=("embeddings.LayerNorm",),
    base_read_norms=("cls.predictions.transform.LayerNorm", "lm_head.layer_norm"),
    gated_inputs=(*HEADS, "pooler.dense", "cls.predictions.transform.dense", "lm_head.dense"),
    outputs=("cls.predictions.transform.dense", "lm_head.dense"),
    inputs=("cls.predictions.decoder", "lm_head.decoder"),
    unless={"classifier": "pooler.dense"},
    others=("cls.seq_relationship", "classifier.out_proj"),
)
DEBERTA = HiddenTable(
    model_types=("deberta-v2",),
    # Without a norm the positions would reach q and k ungated; a convolution would need its channels cut.
    needs={"norm_rel_ebd": "layer_norm", "conv_kernel_size": 0},
    norms=BERT.norms,
    reads=BERT.reads,
    embeddings=(*BERT.embeddings, "encoder.rel_embeddings"),
    base_norms=BERT.base_norms,
    silent_norms=("encoder.LayerNorm",),  # of the relative positions, which are no tokens
    gated_inputs=(*HEADS, "pooler.dense"),
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
    gated_inputs=("pre_classifier", "classifier", "qa_outputs", "vocab_transform"),
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
    gated_inputs=OPT.inputs,
    outputs=OPT.outputs,
    unless=OPT_UNLESS,
)
READERS = ("apt_gates.read",)  # linears that methods put beside the model; they gate the stream themselves
TABLES = (BERT, DEBERTA, DISTILBERT, GEMMA, GPT2, LLAMA, OPT, OPT_POST, PHI3, T5)


@dataclass(frozen=True)
class Part:
    """A module that holds hidden dimensions, or reads them through a gate of its own."""

    name: str  # in full
    module: nn.Module
    kind: str  # "linear", "norm", "embedding", "empty", or "gate": it only gates its input
    axes: tuple[str, ...] = ()  # of a linear: "in" (columns) and "out" (rows, bias)
    gated: bool = False  # what it reads (a linear) or gives (a norm) is gated
    site: bool = False  # that gate collects statistics
    layer: Layer | None = None  # None outside the layers
    aside: bool = False  # in an attention that only a teacher still runs


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


def hidden_parts(model: nn.Module, family: Family) -> list[Part]:
    """Every part of a plain or patched model: those outside the layers, then layer by layer.

    Raises:
        ValueError: no table fits, or a module as wide as the stream is not in it.
    """
    table = hidden_table(model)
    parts, inside = list(_outside(model, table)), set()
    names = {id(module): name for name, module in model.named_modules()}
    for layer in family.layers(model):
        parts += _inside(layer, names[id(layer.module)], table)
        inside |= {id(module) for module in layer.module.modules()}
    known = {id(part.module) for part in parts}
    known |= {id(module) for part in parts if part.kind == "linear" for module in part.module.modules()}
    known |= {id(module) for name in (*table.others, *table.unless) for module in _find(model, name)}
    width = hidden_size(parts)
    for name, module in model.named_modules():
        wide = any(width in parameter.shape for parameter in module.parameters(recurse=False))
        ours = name.startswith("apt_")  # put beside the model, for training alone
        ours |= id(model.get_submodule(name.rpartition(".")[0])) in known  # what a known linear holds follows it
        if wide and not ours and id(module) not in known and not (id(module) in inside and _of_a_head(name)):
            raise ValueError(f"hidden dimensions: it is not known whether {name} reads them")
    return parts


def hidden_size(parts: list[Part]) -> int:
    """The width of the stream, as it is now."""
    norm: Any = next(part.module for part in parts if part.kind == "norm")
    return int(getattr(norm, "n", norm.weight.numel()))


def _of_a_head(name: str) -> bool:
    """Norms of q and k over one head's features, and biases of positions, which may be as many by chance."""
    return name.endswith(("q_norm", "k_norm", "relative_attention_bias"))


def _find(model: nn.Module, name: str) -> list[nn.Module]:
    """The module of that name in the base model, or else in the model; none where there is none."""
    for root in (base_model(model), model):
        try:
            return [root.get_submodule(name)]
        except AttributeError:
            continue
    return []


def _outside(model: nn.Module, table: HiddenTable) -> Iterator[Part]:
    names = {id(module): name for name, module in model.named_modules()}

    def found(entries: tuple[str, ...]) -> Iterator[tuple[str, nn.Module]]:
        for entry in entries:
            if entry in table.unless and _find(model, table.unless[entry]):
                continue
            for module in _find(model, entry):
                yield names[id(module)], module

    for name, module in found(table.embeddings):
        yield Part(name, module, "embedding")
    norms = ((table.base_norms, False, False), (table.base_read_norms, True, True), (table.silent_norms, True, False))
    for entries, gated, site in norms:
        for name, module in found(entries):
            yield Part(name, module, "norm", gated=gated, site=site)
    writes, reads, through_gate = (dict(found(e)) for e in (table.outputs, table.inputs + READERS, table.gated_inputs))
    for name, module in {**reads, **through_gate, **writes}.items():
        if not hasattr(module, "weight"):  # a head of several layers under the name of one
            continue
        gated = name in through_gate
        axes = ("in",) * (gated or name in reads) + ("out",) * (name in writes)
        yield Part(name, module, "linear", axes, gated, gated)


def _inside(layer: Layer, full: str, table: HiddenTable) -> Iterator[Part]:
    there = dict(layer.module.named_modules())
    for part in layer.stack.parts:
        for role, name in part.linears.items():
            if name in there:
                axes = ("out",) if role == part.reader else ("in",)
                yield Part(f"{full}.{name}", there[name], "linear", axes, layer=layer)
        if isinstance(part, Attention) and isinstance(there[part.module], EmptyAttention):
            empty = there[part.module]
            yield Part(f"{full}.{part.module}", empty, "empty", layer=layer)
            for role, name in part.linears.items() if empty.dense else ():
                if name.startswith(f"{part.module}."):
                    inner = empty.dense[0].get_submodule(name.removeprefix(f"{part.module}."))
                    axes = ("out",) if role == part.reader else ("in",)
                    yield Part(f"{full}.{name}", inner, "linear", axes, layer=layer, aside=True)
    for entries, gated in ((table.norms, False), (table.read_norms, True)):
        for name in entries:
            if name not in there:  # layers of an encoder and of a decoder have one table
                continue
            yield Part(f"{full}.{name}", there[name], "norm", gated=gated, site=gated, layer=layer)
    for name in table.reads:
        if not isinstance(there[name], EmptyAttention):
            yield Part(f"{full}.{name}", there[name], "gate", gated=True, site=True, layer=layer)
