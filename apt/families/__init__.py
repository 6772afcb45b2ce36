"""Which families can be pruned, and the one of a model. To add one: a table beside these, and its line here."""

from torch import nn

from apt.families.anatomy import Anatomy, Found, PlacedPart
from apt.families.base import FFN, IGNORED, ROLES, Attention, Family, Layer, Stack, base_model
from apt.families.bert import BERT
from apt.families.deberta import DEBERTA
from apt.families.distilbert import DISTILBERT
from apt.families.empty import EmptyAttention, EmptyLayer, StandIn
from apt.families.gemma import GEMMA
from apt.families.gpt2 import GPT2
from apt.families.llama import LLAMA
from apt.families.opt import OPT
from apt.families.phi3 import PHI3
from apt.families.t5 import T5, T5_GATED

__all__ = [
    "FAMILIES",
    "FFN",
    "IGNORED",
    "ROLES",
    "Anatomy",
    "Attention",
    "EmptyAttention",
    "EmptyLayer",
    "Family",
    "Found",
    "Layer",
    "PlacedPart",
    "Stack",
    "StandIn",
    "anatomy_of",
    "base_model",
    "find_family",
    "known_anatomy",
    "known_family",
]

FAMILIES = (BERT, DEBERTA, DISTILBERT, GEMMA, GPT2, LLAMA, OPT, PHI3, T5, T5_GATED)


def find_family(model: nn.Module) -> Family:
    """The family of a model, by its ``config.model_type`` and the settings that the family needs.

    Raises:
        ValueError: no family knows that type, the model has cross-attention, which none here prunes, or its
            config lacks what the family needs.
    """
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    families = [family for family in FAMILIES if model_type in family.model_types]
    if families and getattr(config, "add_cross_attention", False):
        raise ValueError(f"families: {model_type} with cross-attention cannot be pruned; use method='lora'")
    lacks = [[n for n, value in family.needs if getattr(config, n, None) != value] for family in families]
    for family, names in zip(families, lacks, strict=True):
        if not names:
            return family
    if families:
        name = lacks[0][0]
        raise ValueError(
            f"families: {model_type} with {name}={getattr(config, name, None)!r} cannot be pruned, only with "
            f"{name}={dict(families[0].needs)[name]!r}; use method='lora' with target_modules"
        )
    known = ", ".join(sorted({name for family in FAMILIES for name in family.model_types}))
    raise ValueError(
        f"families: model_type {model_type!r} cannot be pruned; known are {known}; to add one, write its table in "
        f"apt/families/ and list it in FAMILIES, or use method='lora' with target_modules, which needs no family"
    )


def known_family(model: nn.Module) -> Family | None:
    """The family of a model, None where it has none."""
    try:
        return find_family(model)
    except ValueError:
        return None


def anatomy_of(model: nn.Module) -> Anatomy:
    """Find where things are in a model, plain or patched; of a patched one as they were found when it was.

    Raises:
        ValueError: as `find_family`.
    """
    inner = getattr(model, "_orig_mod", model)  # of what torch.compile wraps
    left = getattr(getattr(inner, "_apt", None), "found", None)
    return Anatomy(inner, left.family, left.hidden) if isinstance(left, Found) else Anatomy(inner, find_family(inner))


def known_anatomy(model: nn.Module) -> Anatomy | None:
    """The same; None for a model of no family."""
    try:
        return anatomy_of(model)
    except ValueError:
        return None
