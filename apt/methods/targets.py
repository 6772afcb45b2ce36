"""Which linears get an adapter where the user names none, or one text; rank and scale of each. In PEFT's words."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence

from apt.methods.config import MethodConfig

ALL = "all-linear"
DEFAULTS: dict[str, tuple[str, ...]] = {  # model type -> endings of names, as PEFT has them
    **dict.fromkeys(("bart", "gptj", "gpt_neo", "mixtral", "stablelm", "llama4", "gemma3_text"), ("q_proj", "v_proj")),
    **dict.fromkeys(("xlm-roberta", "electra", "layoutlm"), ("query", "value")),
    **dict.fromkeys(("bloom", "gpt_neox", "chatglm", "falcon"), ("query_key_value",)),
    "phi": ("q_proj", "v_proj", "fc1", "fc2"),
    "deberta": ("in_proj",),
    "gpt_bigcode": ("c_attn",),
    "mpt": ("Wqkv",),
    "codegen": ("qkv_proj",),
}
ATTENTIONS = (  # what query and value, or all three in one, are called: the first of which all are there
    ("q_proj", "v_proj"),
    ("query", "value"),
    ("query_proj", "value_proj"),
    ("q_lin", "v_lin"),
    ("query_key_value",),
    ("qkv_proj",),
    ("c_attn",),
    ("Wqkv",),
)


def default_targets(model_type: str | None, names: Sequence[str]) -> tuple[str, ...] | str:
    """Targets of a model whose family has no table: by its type, by what its attention is called, or all linears."""
    endings = {name.rpartition(".")[2] for name in names}
    known = DEFAULTS.get(model_type or "", ())
    found = (wanted for wanted in (known, *ATTENTIONS) if wanted and endings.issuperset(wanted))
    return next(found, ALL)


def matching(pattern: str, names: Iterable[str], outputs: Iterable[str]) -> list[str]:
    """The names that a regular expression matches as a whole; "all-linear" matches all but the outputs of the model.

    Raises:
        ValueError: it is no regular expression.
    """
    if pattern == ALL:
        return [name for name in names if name not in set(outputs)]
    try:
        wanted = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"patch_model: target_modules {pattern!r} is no regular expression: {error}") from None
    return [name for name in names if wanted.fullmatch(name)]


def rank_and_scale(names: Sequence[str], rank: int, scale: float, settings: MethodConfig) -> tuple[int, float]:
    """r and s of one adapter: s is ``alpha / r``, with rslora ``alpha / sqrt(r)``, where an alpha is given.

    Args:
        names: what the linear is called: its full name, and that of the projection that it is a part of.
        rank: where no pattern matches.
        scale: where no alpha is given.
        settings: lora_alpha, use_rslora and the patterns.
    """
    own = _pattern(settings.rank_pattern, names)
    rank = rank if own is None else int(own)
    alpha = _pattern(settings.alpha_pattern, names)
    alpha = settings.lora_alpha if alpha is None else alpha
    if alpha is None:
        return rank, scale
    return rank, alpha / (math.sqrt(rank) if settings.use_rslora else rank)


def _pattern(table: Mapping[str, float] | None, names: Sequence[str]) -> float | None:
    """The value of the first key that is a name, or the end of one after a dot, or a regular expression for that."""
    matches = (value for key, value in (table or {}).items() if any(re.match(rf"^(.*\.)?({key})$", n) for n in names))
    return next(matches, None)
