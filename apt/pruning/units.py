"""Prunable units: which rows and columns go together, and what each costs, exactly.

A head is a KV group: its rows of k and v, the rows of all its query heads in q, and their columns in o. A neuron is its
rows of the up (and gate) projection and its column of the down projection. Where these are, the family's table says.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from apt.families import Anatomy, Layer, PlacedPart
from apt.families.stock_counts import sayable_heads
from apt.layers import APTAdapter
from apt.layers.hidden import HiddenNorm
from apt.layers.unit_mask import UnitMask


@dataclass(frozen=True)
class Member:
    """One side of one linear that a unit group cuts: `width` neighbouring rows ("out") or columns ("in") a unit."""

    linear: APTAdapter
    axis: str
    width: int

    def cost(self) -> int:
        """Frozen parameters that go with one unit, at the present size of the other side."""
        if self.axis == "in":
            return self.width * self.linear.n_out
        return self.width * (self.linear.n_in + (self.linear.bias is not None))


@dataclass(frozen=True)
class UnitGroup:
    """All units of one part of a layer."""

    part: PlacedPart
    mask: UnitMask
    members: tuple[Member, ...]
    floor: int = 0  # units that always stay

    @property
    def name(self) -> str:
        """``"layers.3.heads"``, ``"decoder.3.cross_heads"``."""
        return self.part.name

    @property
    def kind(self) -> str:
        """A name of `apt.pruning.kinds.UNIT_KINDS`: ``"head"``, ``"neuron"``."""
        return self.mask.kind

    @property
    def holder(self) -> str:
        """The layer that holds the units: where it goes, they do."""
        return self.part.layer.name

    @property
    def num_units(self) -> int:
        return self.mask.num_units

    vectors: ClassVar[tuple[Tensor, ...]] = ()  # a unit owns no number outside the linears
    writers: ClassVar[tuple[APTAdapter, ...]] = ()

    @property
    def reader(self) -> APTAdapter:
        """The projection that reads the units, whose columns they own: output or down."""
        return next(member.linear for member in self.members if member.axis == "in")

    def trained(self) -> Iterator[nn.Parameter]:
        """What trains of its members and has to follow a cut."""
        for member in self.members:
            yield from member.linear.adapter_parameters()

    def stock_counts(self) -> tuple[int, ...] | None:
        """How many of them a stock configuration can say that every layer has, ascending; None: any number."""
        return sayable_heads(self.part) if self.kind == "head" else None

    def cost(self) -> int:
        """Frozen parameters of one unit, adapters not counted."""
        return sum(member.cost() for member in self.members)

    def whole_cost(self) -> int:
        """The same: a unit of a part holds no other."""
        return self.cost()

    def slope(self) -> int:
        """What a unit costs less with one hidden dimension less: its features in the linears that join the stream."""
        return sum(member.width for member in self.members)


def find_units(anatomy: Anatomy, floors: Mapping[str, int] | None = None) -> list[UnitGroup]:
    """The unit groups of a patched model, layer by layer, heads before neurons, at their present sizes.

    Args:
        anatomy: of the model.
        floors: how many units of a kind every part keeps, by its name; 0 where it says nothing.
    """
    groups = []
    required = anatomy.required_heads()
    floors = floors or {}
    for part in anatomy.parts:
        linears = {role: linear for role, linear in part.linears.items() if isinstance(linear, APTAdapter)}
        table = part.table
        mask = linears[table.reader].unit_mask if table.reader in linears else None
        if mask is None or mask.num_units == 0:
            continue
        rows = [linears[role] for role in table.producers if role in linears]
        members = [Member(linear, "out", linear.n_out // mask.num_units) for linear in rows]
        members.append(Member(linears[table.reader], "in", mask.unit_size))
        floor = min(max(floors.get(mask.kind, 0), int(part.name in required)), mask.num_units)
        groups.append(UnitGroup(part, mask, tuple(members), floor))
    return groups


def unit_masks(anatomy: Anatomy) -> dict[str, UnitMask | None]:
    """Every unit group of a patched model, with its mask; None where the projection went with its attention."""
    readers = {part.name: part.reader for part in anatomy.parts}
    return {name: reader.unit_mask if isinstance(reader, APTAdapter) else None for name, reader in readers.items()}


def block_params(anatomy: Anatomy) -> int:
    """Weights and biases of attention, FFN and norms inside the layers that are live; adapters excluded."""
    return sum(layer_params(layer) for layer in anatomy.layers)


def layer_params(layer: Layer) -> int:
    """The same of one layer; 0 where it went as a whole."""
    total = 0
    inside: set[int] = set()
    for module in layer.module.modules():
        if isinstance(module, APTAdapter | HiddenNorm):
            inside.update(id(p) for p in module.parameters())
            total += module.live_params()
    return total + sum(p.numel() for p in layer.module.parameters() if id(p) not in inside)
