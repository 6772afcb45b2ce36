"""What holds the hidden dimensions of one model, by the table of its family."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from apt.families.base import Attention, Layer, find_module, in_base
from apt.families.empty import EmptyAttention
from apt.families.hidden_tables import HiddenTable, hidden_table

# Kind of a part, or side of a linear -> its tensors that run over hidden dimensions, each with the axis that does.
HELD = {
    "norm": (("weight", 0), ("bias", 0)),
    "embedding": (("weight", 1),),
    "empty": (("bias", 0),),
    "in": (("weight", 1),),
    "out": (("weight", 0), ("bias", 0)),
}
READERS = ("apt_gates.read",)  # linears that methods put beside the model; they mask the stream themselves


@dataclass(frozen=True)
class HiddenPart:
    """A module that holds hidden dimensions, or reads them through a mask of its own."""

    name: str  # in full
    module: nn.Module
    kind: str  # "linear", "norm", "embedding", "empty", or "mask": it only masks its input
    axes: tuple[str, ...] = ()  # of a linear: "in" (columns) and "out" (rows, bias)
    masked: bool = False  # what it reads (a linear) or gives (a norm) is masked
    site: bool = False  # that mask collects statistics
    layer: Layer | None = None  # None outside the layers
    aside: bool = False  # in an attention or a layer that only a teacher still runs

    @property
    def held(self) -> list[tuple[str, int]]:
        """Attribute and axis of what runs over hidden dimensions, whether the module has it or not."""
        sides = self.axes if self.kind == "linear" else (self.kind,)
        return [place for side in sides for place in HELD.get(side, ())]

    def tensors(self) -> list[tuple[nn.Parameter, int]]:
        """The parameters that run over hidden dimensions, each with the axis that does."""
        found = [(getattr(self.module, attribute, None), axis) for attribute, axis in self.held]
        return [(tensor, axis) for tensor, axis in found if tensor is not None]


@dataclass(frozen=True)
class OuterPlace:
    """A `HiddenPart` outside the layers, without its module."""

    name: str
    kind: str
    axes: tuple[str, ...]
    masked: bool
    site: bool


class HiddenPlaces:
    """Where a model has its hidden dimensions, by names: it holds no module, as those may change hands.

    Args:
        model: plain or patched.
        layers: of the model.

    Raises:
        ValueError: no table fits, or a module as wide as the stream is not in it.
    """

    def __init__(self, model: nn.Module, layers: list[Layer]) -> None:
        self.table = hidden_table(model)
        self._outside = list(_outside(model, self.table))
        self._refuse_unknown(model, layers)

    def parts(self, model: nn.Module, layers: list[Layer]) -> list[HiddenPart]:
        """Every part, as it is now: those outside the layers, then layer by layer."""
        parts = [
            HiddenPart(place.name, model.get_submodule(place.name), place.kind, place.axes, place.masked, place.site)
            for place in self._outside
        ]
        for name in READERS:
            reader = find_module(model, name)
            if reader is not None:
                parts.append(HiddenPart(name, reader, "linear", ("in",)))
        for layer in layers:
            parts += _inside(layer, self.table)
        return parts

    def _refuse_unknown(self, model: nn.Module, layers: list[Layer]) -> None:
        """Raise ValueError for a module as wide as the stream of which the table says nothing."""
        parts = self.parts(model, layers)
        width = hidden_size(parts)
        known = {id(part.module) for part in parts}
        for part in parts:
            if part.kind == "linear":
                known |= {id(module) for module in part.module.modules()}
        for entry in (*self.table.others, *self.table.unless):
            known |= {id(model.get_submodule(name)) for name in _names(model, entry)}
        inside = {id(module) for layer in layers for module in layer.module.modules()}
        for name, module in model.named_modules():
            wide = any(width in parameter.shape for parameter in module.parameters(recurse=False))
            if not wide or id(module) in known or name.startswith("apt_"):  # put beside the model, for training alone
                continue
            # What a known linear holds follows it.
            of_a_known = id(model.get_submodule(name.rpartition(".")[0])) in known
            if not of_a_known and not (id(module) in inside and _of_a_head(name)):
                raise ValueError(f"hidden dimensions: it is not known whether {name} reads them")


def outer_linears(model: nn.Module) -> list[str]:
    """Full names of the linears outside the layers that read or write hidden dimensions.

    Raises:
        ValueError: no table fits the model.
    """
    return [place.name for place in _outside(model, hidden_table(model)) if place.kind == "linear"]


def hidden_size(parts: Iterable[HiddenPart]) -> int:
    """The width of the stream, as it is now."""
    norm: Any = next(part.module for part in parts if part.kind == "norm")
    return int(getattr(norm, "n", norm.weight.numel()))


def _of_a_head(name: str) -> bool:
    """Whether it is a norm of q and k over one head's features, or a bias of positions: as wide by chance."""
    return name.endswith(("q_norm", "k_norm", "relative_attention_bias"))


def _names(model: nn.Module, entry: str) -> list[str]:
    """The full name of what a table calls so, in the base model or else in the model; none where there is none."""
    return [name for name in (in_base(model, entry), entry) if find_module(model, name) is not None][:1]


def _outside(model: nn.Module, table: HiddenTable) -> Iterator[OuterPlace]:
    """What lies outside the layers."""

    def named(entries: tuple[str, ...]) -> list[str]:
        """Full names of those entries of the table that the model has."""
        found: list[str] = []
        for entry in entries:
            if not (entry in table.unless and _names(model, table.unless[entry])):
                found += _names(model, entry)
        return found

    for name in named(table.embeddings):
        yield OuterPlace(name, "embedding", (), masked=False, site=False)
    norms = ((table.base_norms, False, False), (table.base_read_norms, True, True), (table.silent_norms, True, False))
    for entries, masked, site in norms:
        for name in named(entries):
            yield OuterPlace(name, "norm", (), masked, site)
    masked_readers = named(table.masked_inputs)
    readers = [*named(table.inputs), *masked_readers]
    writers = named(table.outputs)
    for name in dict.fromkeys((*readers, *writers)):
        # A head of several layers may go under the name of one.
        if not hasattr(model.get_submodule(name), "weight"):
            continue
        axes = [axis for axis, names in (("in", readers), ("out", writers)) if name in names]
        masked = name in masked_readers
        yield OuterPlace(name, "linear", tuple(axes), masked, site=masked)


def _inside(layer: Layer, table: HiddenTable) -> Iterator[HiddenPart]:
    """What lies in a layer; where it went, in the one that a teacher still runs."""
    whole = layer.whole
    if whole is None:
        return
    there = dict(whole.named_modules())
    for part in _parts(layer, there, table):
        yield replace(part, aside=part.aside or layer.gone)


def _parts(layer: Layer, there: dict[str, nn.Module], table: HiddenTable) -> Iterator[HiddenPart]:
    """What lies among the modules of a layer, by their names in it."""
    for part in layer.stack.parts:
        axes = {role: ("out",) if role == part.reader else ("in",) for role in part.linears}
        for role, name in part.linears.items():
            if name in there:
                yield HiddenPart(f"{layer.path}.{name}", there[name], "linear", axes[role], layer=layer)
        if not isinstance(part, Attention):
            continue
        empty = there[part.module]
        if not isinstance(empty, EmptyAttention):
            continue
        yield HiddenPart(f"{layer.path}.{part.module}", empty, "empty", layer=layer)
        inside = {role: name for role, name in part.linears.items() if name.startswith(f"{part.module}.")}
        for attention in empty.dense:
            for role, name in inside.items():
                inner = attention.get_submodule(name.removeprefix(f"{part.module}."))
                yield HiddenPart(f"{layer.path}.{name}", inner, "linear", axes[role], layer=layer, aside=True)
    for entries, masked in ((table.norms, False), (table.read_norms, True)):
        for name in entries:
            if name in there:  # layers of an encoder and of a decoder have one table
                yield HiddenPart(f"{layer.path}.{name}", there[name], "norm", masked=masked, site=masked, layer=layer)
    for name in table.reads:
        if not isinstance(there[name], EmptyAttention):
            yield HiddenPart(f"{layer.path}.{name}", there[name], "mask", masked=True, site=True, layer=layer)
