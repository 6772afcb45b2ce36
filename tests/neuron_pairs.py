"""A unit kind that this package does not have: two neighbouring neurons that stay or go together."""

from apt.families import FFN, PlacedPart
from apt.pruning.kinds import UnitKind


def pairs_in(part: PlacedPart) -> int | None:
    return part.num_units // 2 if isinstance(part.table, FFN) else None


NEURON_PAIR = UnitKind(name="neuron_pair", rounded=False, units_in=pairs_in)
