"""Where things are in one model: its layers, parts, linears by role, asked by every room that acts on it.

It holds names and looks modules up by them, so it stays true as linears are replaced, cut, or go with their attention.
A patched model remembers its family and what was found when it was patched (`Found`), and no anatomy: that refers to
the model, which the last reference of a user is to free.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from apt.families.base import FFN, Attention, Family, Layer, Stack, base_model, find_module
from apt.families.empty import HEAD_SIZES, EmptyAttention
from apt.families.hidden_parts import HiddenPart, HiddenPlaces
from apt.families.hidden_tables import HiddenTable, hidden_table
from apt.families.linears import features


@dataclass(frozen=True)
class PlacedPart:
    """The attention or the feed-forward part of one layer: its table, in its place."""

    layer: Layer
    table: Attention | FFN

    @property
    def name(self) -> str:
        """What its units are called: ``"layers.3.heads"``, ``"decoder.3.cross_heads"``."""
        return f"{self.layer.name}.{self.table.units}"

    @property
    def attention(self) -> Attention:
        """The table of a part that is an attention."""
        assert isinstance(self.table, Attention), f"{self.name} is no attention"
        return self.table

    @property
    def paths(self) -> dict[str, str]:
        """Role -> full name of its linear, whether that is there or not."""
        return {role: f"{self.layer.path}.{name}" for role, name in self.table.linears.items()}

    @property
    def fused_path(self) -> str | None:
        """Full name of the one projection that stores several roles; None where the family has none."""
        return None if self.table.fused_linear is None else f"{self.layer.path}.{self.table.fused_linear}"

    @property
    def module(self) -> nn.Module:
        """The attention, or what stands for it; of a feed-forward part, which may have no module, the layer."""
        return self.layer.module.get_submodule(self.table.module if isinstance(self.table, Attention) else "")

    @property
    def linears(self) -> dict[str, nn.Module]:
        """Role -> linear; what went with its attention is left out."""
        found = {role: find_module(self.layer.model, path) for role, path in self.paths.items()}
        return {role: module for role, module in found.items() if module is not None}

    @property
    def reader(self) -> nn.Module | None:
        """The output or down projection, whose columns the units own; None where it went with its attention."""
        return self.linears.get(self.table.reader)

    @property
    def num_units(self) -> int:
        """Heads (KV groups) or neurons, of a model patched or not, from what its last linear reads."""
        reader = self.reader
        module = self.module
        if reader is None or isinstance(module, EmptyAttention):
            return 0
        _, columns = features(reader)
        if not isinstance(self.table, Attention):
            return columns
        config: Any = self.layer.model.config
        heads = int(config.num_attention_heads)
        query_heads = heads // int(getattr(config, "num_key_value_heads", None) or heads)  # of a group
        return columns // (head_size(module) * query_heads)


@dataclass(frozen=True)
class Found:
    """What is found once in a model, by names alone: any copy of the model can keep it."""

    family: Family
    hidden: HiddenPlaces | None  # where hidden dimensions are; None where nobody asked, or they cannot be removed


class Anatomy:
    """The layers, parts, linears and hidden dimensions of a model of a known family.

    Args:
        model: plain or patched; whatever becomes of its modules, their names stay.
        family: of the model.
        hidden: where its hidden dimensions are, where that was found before.
    """

    def __init__(self, model: nn.Module, family: Family, hidden: HiddenPlaces | None = None) -> None:
        self.model = model
        self.family = family
        self._hidden = hidden
        self.layers = family.layers(model)  # those that went too

    @property
    def parts(self) -> list[PlacedPart]:
        """The parts of the layers that are there, layer by layer."""
        return [PlacedPart(layer, table) for layer in self.layers if not layer.gone for table in layer.stack.parts]

    @property
    def gone(self) -> list[str]:
        """Names of the layers that went as a whole."""
        return [layer.name for layer in self.layers if layer.gone]

    @property
    def stacks(self) -> list[Stack]:
        """The stacks that the model has, the encoder first."""
        return list(dict.fromkeys(layer.stack for layer in self.layers))

    def reader(self, stack: Stack) -> nn.Module:
        """The innermost module around the layers of a stack that embeds tokens: where ids and their mask come in."""
        base = base_model(self.model)
        places = stack.layers.split(".")
        around = [base.get_submodule(".".join(places[:depth])) for depth in range(len(places))]
        return next(module for module in reversed(around) if hasattr(module, "get_input_embeddings"))

    @property
    def attentions(self) -> list[PlacedPart]:
        """The parts that are attentions."""
        return [part for part in self.parts if isinstance(part.table, Attention)]

    @property
    def found(self) -> Found:
        """What was found until now, without the model."""
        return Found(self.family, self._hidden)

    @property
    def _hidden_places(self) -> HiddenPlaces:
        if self._hidden is None:
            self._hidden = HiddenPlaces(self.model, self.layers)
        return self._hidden

    @property
    def has_hidden(self) -> bool:
        """Whether hidden dimensions can be removed from the model."""
        try:
            return bool(self._hidden_places)
        except ValueError:
            return False

    @property
    def hidden_table(self) -> HiddenTable:
        """What the family's table says of hidden dimensions. Raises ValueError where no table fits."""
        return hidden_table(self.model)

    def hidden_parts(self) -> list[HiddenPart]:
        """What holds hidden dimensions now: what lies outside the layers, then layer by layer.

        Raises:
            ValueError: they cannot be removed from this model; the text says why.
        """
        return self._hidden_places.parts(self.model, self.layers)

    def required_heads(self) -> set[str]:
        """Unit groups that must keep a head (KV group).

        In a decoder the first layer of each attention type: cached generation reads the cache and mask lengths there.
        An encoder that its config makes a decoder (BERT with ``is_decoder``) is one. And the last cross-attention,
        without which nothing of the input would reach the output.
        """
        config = getattr(self.model, "config", None)
        types = list(getattr(config, "layer_types", None) or [])
        made_decoder = len(self.stacks) == 1 and getattr(config, "is_decoder", False)
        first = {0} | {types.index(kind) for kind in set(types)}
        required = set()
        for stack in {layer.stack for layer in self.layers if layer.stack.decoder or made_decoder}:
            last = max(layer.index for layer in self.layers if layer.stack == stack)
            for table in stack.parts:
                if isinstance(table, Attention):
                    kept = {last} if table.cross else first
                    required |= {f"{stack.name}.{index}.{table.units}" for index in kept}
        return required

    def required_layers(self) -> set[str]:
        """Layers that cannot go: the first where it holds what all share, and those with a head that must stay."""
        first = {layer.name for layer in self.layers if layer.index == 0 and layer.stack.first_stays}
        return first | {name.rpartition(".")[0] for name in self.required_heads()}

    def refuse_layers(self) -> None:
        """Raise ValueError where no whole layer of this model can go; the text says why."""
        config: Any = self.model.config
        for name, value in self.family.layers_need:
            found = getattr(config, name, value)
            if found != value:
                raise ValueError(
                    f"patch_model: whole layers of {config.model_type} with {name}={found!r} cannot go, as it counts "
                    f"them; take 'layer' out of unit_types"
                )

    def num_units(self) -> dict[str, int]:
        """Heads (KV groups) and neurons that every part has now."""
        return {part.name: part.num_units for part in self.parts}


def head_size(attention: nn.Module) -> int:
    """Features of one head of an attention module."""
    sizes = (getattr(attention, name, None) for name in HEAD_SIZES)
    size = next((size for size in sizes if size), None)
    assert isinstance(size, int), f"{type(attention).__name__} names no head size"
    return size
