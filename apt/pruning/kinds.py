"""The kinds of units that can go, one line each: what every room asks of a kind stands here and nowhere else."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from apt.families import FFN, Anatomy, Attention, PlacedPart
from apt.pruning.dimensions import NAME, HiddenGroup, find_dimensions


@dataclass(frozen=True, kw_only=True)
class UnitKind:
    """A kind of prunable units. It lies in the parts of layers (`units_in`) or across them all (`find`), or is a layer.

    Args:
        name: in `unit_types`, in groups and in messages.
        floor: setting of `PruningConfig` that says how many always stay; None: none must.
        rounded: whether they are kept in multiples of `round_to`.
        units_in: how many a part of a layer has, None where it has none of this kind. Each owns as many neighbouring
            columns of the part's output or down projection as the others, and the rows that make them.
        find: the one group of a kind across layers, in a patched model, from the anatomy and the floor.
        holds_units: whether a unit is a whole layer, which takes the units of its parts along.
    """

    name: str
    floor: str | None = None
    rounded: bool = True
    units_in: Callable[[PlacedPart], int | None] = lambda part: None
    find: Callable[[Anatomy, int], HiddenGroup] | None = None
    holds_units: bool = False

    @property
    def timed(self) -> bool:
        """Whether its units are priced by time."""
        return not (self.across_layers or self.holds_units)

    @property
    def across_layers(self) -> bool:
        """Whether its units multiply with those of the layers: they have no price of their own, in size or in time."""
        return self.find is not None


HEAD = UnitKind(
    name="head",
    floor="min_heads",
    rounded=False,
    units_in=lambda part: part.num_units if isinstance(part.table, Attention) else None,
)
NEURON = UnitKind(
    name="neuron",
    floor="min_neurons",
    units_in=lambda part: part.num_units if isinstance(part.table, FFN) else None,
)
HIDDEN = UnitKind(
    name=NAME,
    floor="min_hidden",
    find=lambda anatomy, floor: find_dimensions(anatomy, min_hidden=floor),
)
LAYER = UnitKind(name="layer", floor="min_layers", rounded=False, holds_units=True)
UNIT_KINDS = {kind.name: kind for kind in (HEAD, NEURON, HIDDEN, LAYER)}


def kind_in(part: PlacedPart, asked: Iterable[str]) -> UnitKind | None:
    """The kind whose units a part of a layer gets a mask for: one that is asked for, else the first of the table.

    Raises:
        ValueError: two kinds that are asked for share the part.
    """
    wanted = [UNIT_KINDS[name] for name in asked]
    sharing = [kind for kind in wanted if kind.units_in(part) is not None]
    if len(sharing) > 1:
        raise ValueError(
            f"pruning: {sharing[0].name!r} and {sharing[1].name!r} are units of one part, {part.name}; "
            f"leave one of them out of unit_types"
        )
    others = [kind for kind in UNIT_KINDS.values() if kind.units_in(part) is not None]
    return next(iter([*sharing, *others]), None)
