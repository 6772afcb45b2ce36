"""Whether a stock configuration describes a pruned model: then anybody's `AutoModel` loads it, without this package."""

import copy
from typing import Any

from torch import Size, nn

from apt.export.remote_model import OwnSizes
from apt.export.renumber import count_layers
from apt.families import Anatomy, Attention
from apt.families.anatomy import head_size
from apt.families.stock_counts import as_mistral
from apt.layers.derived import plain_class


def stock_class(model: nn.Module) -> Any:
    """The class of a model; of a free export that `AutoModel` made, the stock class that it extends."""
    kinds = plain_class(model).__mro__
    own = [place for place, kind in enumerate(kinds) if kind.__name__ == OwnSizes.__name__]
    return kinds[own[0] + 1] if own else kinds[0]


def stock_config(
    anatomy: Anatomy, units: dict[str, int], shapes: dict[str, Size], hidden: int = 0
) -> tuple[Any, str | None]:
    """The configuration with which the stock class builds the model at its present sizes.

    A stock configuration has one number of heads and one of neurons for all layers. Whether it says enough is not
    taken from a table alone: the model is built from it, without memory, and its shapes are compared.

    Args:
        anatomy: of a patched model, whose own config is not changed.
        units: left in every unit group, as `apt.summary` counts them.
        shapes: of the tensors that are exported, by the names that they have there.
        hidden: dimensions left; 0 where they cannot be removed.

    Returns:
        A copy of the config with the counts of now, and None; or the config as it is but for its number of layers, and
        what it cannot say.
    """
    model_config: Any = anatomy.model.config
    unchanged = copy.deepcopy(model_config)
    count_layers(unchanged, anatomy)
    config = copy.deepcopy(unchanged)
    reason = _set_counts(config, anatomy, units)
    if reason is None and hidden not in (0, model_config.hidden_size):
        reason = _set_width(config, anatomy, hidden)
    if reason is None:
        reason = _refusal(config, anatomy.model, shapes)
        other = None if reason is None else as_mistral(config)
        if other is not None and _refusal(other, anatomy.model, shapes) is None:
            return other, None
    return (config, None) if reason is None else (unchanged, reason)


def _refusal(config: Any, model: nn.Module, shapes: dict[str, Size]) -> str | None:
    """Why no model of these shapes is made from a config."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        read = type(config).from_dict(config.to_dict())  # which is where a config checks its numbers
        return first_difference(described_class(model, config), read, shapes)
    except (ValueError, StrictDataclassError) as error:
        return " ".join(str(error).split())


def described_class(model: nn.Module, config: Any) -> Any:
    """The class that a config describes a model by: its own, or, where a Llama is written as a Mistral, that one."""
    own = stock_class(model)
    theirs = str(getattr(model.config, "model_type", ""))
    if getattr(config, "model_type", "") == theirs:
        return own
    import transformers

    return getattr(transformers, own.__name__.replace(theirs.title(), config.model_type.title()))


def _set_counts(config: Any, anatomy: Anatomy, units: dict[str, int]) -> str | None:
    """Write the counts into a config; what it cannot say is returned."""
    name = type(config).__name__
    for kind, title in (("head", "heads"), ("neuron", "neurons")):
        parts = [part for part in anatomy.parts if part.table.kind == kind]
        counts = {units[part.name] for part in parts}
        if len(counts) > 1:
            return f"{name} has one number of {title} for all layers, but they have {min(counts)} to {max(counts)}"
        table = parts[0].table
        count = counts.pop()
        if isinstance(table, Attention):
            before = getattr(config, (table.settings or ("num_attention_heads",))[-1])
        else:
            before = getattr(config, table.setting)  # None where it follows from the hidden size
        if count == before:
            continue
        if count == 0:
            return f"{name} describes no layer without {title}"
        if isinstance(table, Attention) and table.follow is not None:
            return f"{name} cannot say which {count} of {before} {title} a layer has"
        if not isinstance(table, Attention):
            setattr(config, table.setting, count)
        elif table.settings:
            config.head_dim = head_size(parts[0].module)
            for setting in table.settings:
                setattr(config, setting, getattr(config, setting) * count // before)
        else:
            return f"{name} derives the size of a head from the number of heads, so it cannot say {count} of {before}"
    return None


def _set_width(config: Any, anatomy: Anatomy, hidden: int) -> str | None:
    """Write the hidden dimensions into a config; what it cannot say is returned."""
    name = type(config).__name__
    constant = anatomy.hidden_table.constant
    if constant:
        return f"{name} derives {constant} from the hidden size, so it cannot say {hidden} of {config.hidden_size}"
    for part in anatomy.attentions:
        if not part.attention.settings:
            return f"{name} derives the size of a head from the hidden size, so it cannot say {hidden}"
        config.head_dim = head_size(part.module)
    config.hidden_size = hidden
    return None


def first_difference(kind: Any, config: Any, shapes: dict[str, Size]) -> str | None:
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        built = kind(config).state_dict()
    for name, shape in shapes.items():
        if name not in built or built[name].shape != shape:
            there = list(built[name].shape) if name in built else "not there"
            return f"{name} is {list(shape)}, and with {type(config).__name__} {there}"
    return None
