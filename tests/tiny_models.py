"""Random models of a few layers whose weights are large enough that a wrong index shows.

At the usual initialisation a wrong neuron moves a logit by 1e-4 and a wrong bias by nothing; so the range is 0.2 and
biases and norm weights are random too.
"""

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from apt.families import anatomy_of
from apt.families.hidden_tables import TABLES
from apt.layers import adapted
from apt.pruning.dimensions import Group, find_dimensions
from apt.pruning.units import find_units
from apt.records import PrunePlan

VOCABULARY = 60
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
ENCODER = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3}
DEBERTA = {
    **ENCODER,
    "relative_attention": True,
    "position_buckets": 4,
    "pos_att_type": ["p2c", "c2p"],
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
    "type_vocab_size": 0,
}
DISTILBERT = {
    "hidden_dim": 40,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "seq_classif_dropout": 0.0,
    "sinusoidal_pos_embds": True,
    "num_labels": 3,
}
GROUPED = {"num_attention_heads": 8, "num_key_value_heads": 4}
GPT2 = {"n_inner": 40, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "summary_first_dropout": 0.0}
PHI3 = {**GROUPED, "partial_rotary_factor": 0.5, "original_max_position_embeddings": 64}
OPT = {"ffn_dim": 40, "init_std": 0.2, "dropout": 0.0, "num_labels": 3}
MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
GEMMA = {
    **GROUPED,
    "head_dim": 8,
    "query_pre_attn_scalar": 5,
    "rms_norm_eps": 0.1,  # norms follow on norms: at 1e-6 the gradient of a padding token, whose embedding is 0, is 1e9
    "sliding_window": 4,
    "layer_types": MIXED[:3],
}
T5 = {
    "d_kv": 6,
    "d_ff": 40,
    "num_decoder_layers": 2,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
    "initializer_factor": 0.5,
}
T5_GATED = {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}


class Tiny(NamedTuple):
    config: str  # class names of transformers
    model: str
    settings: dict[str, Any]


MODELS = {
    "bert": Tiny("BertConfig", "BertForSequenceClassification", ENCODER),
    "bert_mlm": Tiny("BertConfig", "BertForMaskedLM", ENCODER),
    "roberta": Tiny("RobertaConfig", "RobertaForSequenceClassification", {**ENCODER, "type_vocab_size": 1}),
    "deberta": Tiny("DebertaV2Config", "DebertaV2ForSequenceClassification", DEBERTA),
    "distilbert": Tiny("DistilBertConfig", "DistilBertForSequenceClassification", DISTILBERT),
    "llama": Tiny("LlamaConfig", "LlamaForCausalLM", {"num_key_value_heads": 4}),
    "llama_gqa": Tiny("LlamaConfig", "LlamaForCausalLM", {**GROUPED, "tie_word_embeddings": True}),
    "llama_bias": Tiny("LlamaConfig", "LlamaForCausalLM", {**GROUPED, "attention_bias": True, "mlp_bias": True}),
    "llama_cls": Tiny("LlamaConfig", "LlamaForSequenceClassification", {**GROUPED, "num_labels": 3}),
    "mistral": Tiny("MistralConfig", "MistralForCausalLM", {**GROUPED, "sliding_window": 4}),
    "qwen2": Tiny("Qwen2Config", "Qwen2ForCausalLM", GROUPED),
    "qwen2_mixed": Tiny(
        "Qwen2Config",
        "Qwen2ForCausalLM",
        {**GROUPED, "num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 4, "layer_types": MIXED},
    ),
    "qwen3": Tiny("Qwen3Config", "Qwen3ForCausalLM", {**GROUPED, "head_dim": 16}),
    "gemma2": Tiny("Gemma2Config", "Gemma2ForCausalLM", {**GEMMA, "attn_logit_softcapping": 2.0}),
    "gemma3": Tiny("Gemma3TextConfig", "Gemma3ForCausalLM", GEMMA),
    "gpt2": Tiny("GPT2Config", "GPT2LMHeadModel", {**GPT2, "scale_attn_by_inverse_layer_idx": True}),
    "gpt2_cls": Tiny("GPT2Config", "GPT2ForSequenceClassification", {**GPT2, "num_labels": 3}),
    "phi3": Tiny("Phi3Config", "Phi3ForCausalLM", PHI3),
    "phi3_sliding": Tiny("Phi3Config", "Phi3ForCausalLM", {**PHI3, "head_dim": 16, "sliding_window": 4}),
    "opt": Tiny("OPTConfig", "OPTForCausalLM", OPT),
    "opt_350m": Tiny(  # the one that norms after each branch and projects its embeddings
        "OPTConfig", "OPTForSequenceClassification", {**OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 16}
    ),
    "t5": Tiny("T5Config", "T5ForConditionalGeneration", T5),
    "t5_gated": Tiny("T5Config", "T5ForConditionalGeneration", T5_GATED),
    "mt5": Tiny("MT5Config", "MT5ForConditionalGeneration", T5_GATED),
}
NAMES = list(MODELS)
CLASSIFIERS = [name for name in NAMES if MODELS[name].model.endswith("SequenceClassification")]
SEQ2SEQ = [name for name in NAMES if MODELS[name].model.endswith("ConditionalGeneration")]
GENERATORS = [name for name in NAMES if MODELS[name].model.endswith(("CausalLM", "LMHeadModel"))] + SEQ2SEQ


def has_hidden_table(name: str) -> bool:
    """Whether a family's hidden dimensions can be pruned."""
    import transformers

    model_type = getattr(transformers, MODELS[name].config).model_type
    return any(model_type in table.model_types for table in TABLES)


def tiny_model(name: str, dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    """A random model in evaluation mode; `settings` go into its config."""
    import transformers

    spec = MODELS[name]
    torch.manual_seed(1)
    config = getattr(transformers, spec.config)(**{**SIZES, **spec.settings, **settings})
    model = getattr(transformers, spec.model)(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() == 1:  # biases start at 0, norms at 1, Gemma's norms at 0
                parameter.normal_(parameter[0].item(), 0.2)
            if "relative_attention_bias" in key:
                parameter.normal_()
    return model.to(dtype).eval()


def tiny_batch(name: str, size: int = 4, length: int = 9, seed: int = 2) -> dict[str, Tensor]:
    """Token ids, labels and a padding mask with rows of different lengths; labels of a decoder have others again."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (size, length), generator=draw)
    mask = torch.ones_like(ids)
    for row in range(size):
        mask[row, length - row % 4 :] = 0  # 0 to 3 tokens of padding
    labels = torch.randint(0, 3, (size,), generator=draw) if name in CLASSIFIERS else ids.clone()
    if name in SEQ2SEQ:
        labels = torch.randint(1, VOCABULARY, (size, length - 2), generator=draw)
        for row in range(size):
            labels[row, length - 2 - (row + 1) % 3 :] = -100
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask, "labels": labels}


def fill_adapters(model: nn.Module, std: float = 0.2) -> nn.Module:
    """Give every adapter a B that is not zero, as training would."""
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, module in adapted(model):
            if module.lora_B is not None:
                module.lora_B.copy_(torch.randn(module.lora_B.shape, generator=draw, dtype=torch.float64) * std)
    return model


def free_heads(model: nn.Module) -> list[str]:
    """The groups of heads that may lose all."""
    anatomy = anatomy_of(model)
    required = anatomy.required_heads()
    return [group.name for group in find_units(anatomy) if group.kind == "head" and group.name not in required]


def random_plan(
    model: nn.Module, *, empty: Collection[str] = (), hidden: bool = False, keep: float = 0.6, seed: int
) -> PrunePlan:
    """A plan that keeps a random share of each group, at least one unit, and nothing of the groups named.

    With `hidden` it keeps a larger share of the hidden dimensions too.
    """
    draw = torch.Generator().manual_seed(seed)
    kept = {}
    for group in find_units(anatomy_of(model)):
        chosen = torch.rand(group.num_units, generator=draw) < keep
        chosen[torch.randint(group.num_units, (1,), generator=draw)] = True
        kept[group.name] = [] if group.name in empty else chosen.nonzero().flatten().tolist()
    if hidden:
        chosen = torch.rand(find_dimensions(anatomy_of(model)).num_units, generator=draw) < 0.8
        kept["hidden"] = chosen.nonzero().flatten().tolist()
    return PrunePlan(step=seed, target_sparsity=1.0 - keep, kept=kept, round_to=1)


def set_masks(model: nn.Module, plan: PrunePlan) -> None:
    """Shut with masks what the plan removes."""
    groups: list[Group] = [g for g in find_units(anatomy_of(model)) if g.name in plan.kept]
    if "hidden" in plan.kept:
        groups.append(find_dimensions(anatomy_of(model)))
    for group in groups:
        mask = torch.zeros(group.num_units)
        mask[plan.kept[group.name]] = 1.0
        group.mask.set_mask(mask)
