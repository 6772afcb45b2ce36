"""The hidden dimensions of a model as one group of units: its members, its exact cost."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from apt.families import Anatomy, EmptyAttention
from apt.families.hidden_parts import HiddenPart
from apt.layers import APTAdapter
from apt.layers.hidden import HiddenMask, HiddenNorm
from apt.pruning.layers import LayerGroup
from apt.pruning.units import Member, UnitGroup

NAME = "hidden"  # name and kind of the group


@dataclass(frozen=True)
class HiddenGroup:
    """All hidden dimensions of a model, one unit each."""

    mask: HiddenMask
    parts: tuple[HiddenPart, ...]  # of the patched model
    floor: int = 0  # dimensions that always stay

    name: ClassVar[str] = NAME
    kind: ClassVar[str] = NAME
    reader: ClassVar[None] = None  # many projections read them
    holder: ClassVar[None] = None  # they lie in all layers

    @property
    def num_units(self) -> int:
        return self.mask.num_units

    @property
    def members(self) -> list[Member]:
        """The adapted linears of the layers, each with the side that the dimensions own."""
        return [member for part in self._inside for member in _members(part)]

    @property
    def vectors(self) -> list[Tensor]:
        """What the layers hold of the dimensions beside linears, ``[num_units]`` each: norms, biases that stayed."""
        return [vector for part in self._inside for vector in _vectors(part)]

    @property
    def _inside(self) -> list[HiddenPart]:
        """Its parts in the layers, but for those that only a teacher still runs."""
        return [part for part in self.parts if part.layer is not None and not part.aside]

    def costs_by_layer(self) -> dict[str, int]:
        """Frozen parameters of each layer that go with one dimension, at the present heads and neurons."""
        costs: dict[str, int] = {}
        for part in self._inside:
            assert part.layer is not None
            cost = sum(member.cost() for member in _members(part)) + len(_vectors(part))
            costs[part.layer.name] = costs.get(part.layer.name, 0) + cost
        return costs

    @property
    def writers(self) -> list[APTAdapter]:
        """Output and down projections of all layers, whose rows the dimensions own."""
        return [member.linear for member in self.members if member.axis == "out"]

    def trained(self) -> Iterator[nn.Parameter]:
        """What trains of its parts and has to follow a cut."""
        for part in self.parts:
            if isinstance(part.module, APTAdapter):
                yield from part.module.adapter_parameters()
            elif part.kind != "mask":
                yield from (p for p in part.module.parameters(recurse=False) if p.requires_grad)

    def cost(self) -> int:
        """Frozen parameters inside the layers that go with one dimension, at the present heads and neurons."""
        return sum(self.costs_by_layer().values())

    def whole_cost(self) -> int:
        """The same: a dimension holds no other unit."""
        return self.cost()

    def slope(self) -> int:
        """Dimensions are priced by what heads and neurons cost less without them."""
        return 0


def _members(part: HiddenPart) -> list[Member]:
    """An adapted linear with each side that the dimensions own; nothing of another part."""
    if not isinstance(part.module, APTAdapter):
        return []
    return [Member(part.module, axis, 1) for axis in part.axes]


def _vectors(part: HiddenPart) -> list[Tensor]:
    """What a norm, or an attention without heads, holds of the dimensions; nothing of another part."""
    if isinstance(part.module, HiddenNorm):
        return [vector for vector in part.module.view() if vector is not None]
    bias = part.module.bias if isinstance(part.module, EmptyAttention) else None
    return [] if bias is None else [bias]


Group = UnitGroup | LayerGroup | HiddenGroup


def find_dimensions(anatomy: Anatomy, *, min_hidden: int = 0) -> HiddenGroup:
    """The hidden dimensions of a patched model at their present size.

    Raises:
        ValueError: they cannot be removed from this model; the text says why.
    """
    parts = anatomy.hidden_parts()
    mask = next(part.module.hidden for part in parts if isinstance(part.module, HiddenNorm))
    return HiddenGroup(mask, tuple(parts), min(min_hidden, mask.num_units))


def hidden_group(anatomy: Anatomy | None) -> HiddenGroup | None:
    """The hidden dimensions of a patched model; None where their masks are not in."""
    if anatomy is None or not anatomy.has_hidden:
        return None
    masked = any(isinstance(part.module, HiddenNorm) for part in anatomy.hidden_parts())
    return find_dimensions(anatomy) if masked else None
