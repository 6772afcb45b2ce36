"""Which families can be pruned, and the one of a model. To add one: a table beside these, and its line here."""

from torch import nn

from apt.families.base import ROLES, Family, base_model
from apt.families.bert import BERT
from apt.families.deberta import DEBERTA
from apt.families.distilbert import DISTILBERT
from apt.families.empty import EmptyAttention
from apt.families.gemma import GEMMA
from apt.families.llama import LLAMA
from apt.families.opt import OPT

FAMILIES = (BERT, DEBERTA, DISTILBERT, GEMMA, LLAMA, OPT)

__all__ = ["FAMILIES", "ROLES", "EmptyAttention", "Family", "base_model", "find_family"]


def find_family(model: nn.Module) -> Family:
    """The family of a model, by its ``config.model_type``.

    Raises:
        ValueError: no family knows that type, the model has cross-attention, which none here prunes, or its
            config lacks what the family needs.
    """
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    for family in FAMILIES:
        if model_type in family.model_types:
            if getattr(config, "add_cross_attention", False):
                raise ValueError(f"families: {model_type} with cross-attention cannot be pruned; use method='lora'")
            for name, value in family.needs:
                found = getattr(config, name, None)
                if found != value:
                    raise ValueError(
                        f"families: {model_type} with {name}={found!r} cannot be pruned, only with {name}={value!r}; "
                        f"use method='lora' with target_modules"
                    )
            return family
    known = ", ".join(sorted(name for family in FAMILIES for name in family.model_types))
    raise ValueError(
        f"families: model_type {model_type!r} cannot be pruned; known are {known}; to add one, write its table in "
        f"apt/families/ and list it in FAMILIES, or use method='lora', which needs no family"
    )
