"""Whole layers as units: each a group of one, that holds the heads and neurons of its parts."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from apt.families import Anatomy, Layer
from apt.layers import APTAdapter
from apt.layers.layer_mask import LayerMask, layer_mask
from apt.pruning.units import UnitGroup, layer_params
from apt.records import UnitName

UNITS = "layers"  # what the groups are called: "layers.3.layers", "decoder.3.layers"


@dataclass(frozen=True)
class LayerGroup:
    """One layer. Where it goes, the units in it go with it, and cost nothing more.

    Args:
        layer: that may go.
        mask: of the layer.
        params: frozen parameters of the layer now.
        own: those that are of no other unit of the search.
        own_slope: how many of these go with one hidden dimension; 0 where none can go.
        floor: 1 where it must stay.
    """

    layer: Layer
    mask: LayerMask
    params: int
    own: int
    own_slope: int = 0
    floor: int = 0

    kind: ClassVar[str] = "layer"
    num_units: ClassVar[int] = 1
    reader: ClassVar[None] = None
    members: ClassVar[tuple[()]] = ()
    vectors: ClassVar[tuple[Tensor, ...]] = ()
    writers: ClassVar[tuple[APTAdapter, ...]] = ()

    @property
    def name(self) -> str:
        """``"layers.3.layers"``, ``"decoder.3.layers"``."""
        return f"{self.layer.name}.{UNITS}"

    @property
    def holder(self) -> str:
        """The layer that holds the unit: itself."""
        return self.layer.name

    def trained(self) -> Iterator[nn.Parameter]:
        """What trains in it, and goes with it."""
        yield from (parameter for parameter in self.layer.module.parameters() if parameter.requires_grad)

    def cost(self) -> int:
        """Frozen parameters that go with it and with no other unit."""
        return self.own

    def whole_cost(self) -> int:
        """Frozen parameters that go with it, those of its units too."""
        return self.params

    def slope(self) -> int:
        """What its own part costs less with one hidden dimension less."""
        return self.own_slope


def find_layers(
    anatomy: Anatomy, units: Sequence[UnitGroup] = (), slopes: Mapping[str, int] | None = None
) -> list[LayerGroup]:
    """The layers of a patched model that are there.

    Args:
        anatomy: of the model.
        units: that may go beside them, at their present sizes.
        slopes: parameters of each layer that go with one hidden dimension, by its name, where these may go too.
    """
    required = anatomy.required_layers()
    groups = []
    for layer in anatomy.layers:
        mask = layer_mask(layer.module)
        if mask is None:
            continue
        inside = [group for group in units if group.holder == layer.name]
        params = layer_params(layer)
        own = params - sum(group.num_units * group.cost() for group in inside)
        slope = 0
        if slopes is not None:
            slope = slopes[layer.name] - sum(group.num_units * group.slope() for group in inside)
        groups.append(LayerGroup(layer, mask, params, own, slope, int(layer.name in required)))
    return groups


def gone_layers(kept: Mapping[str, Sequence[int]]) -> set[str]:
    """Names of the layers that go by a plan."""
    return {name.rpartition(".")[0] for name, positions in kept.items() if _is_layer(name) and not positions}


def without_gone(kept: Mapping[str, Sequence[int]]) -> dict[str, Sequence[int]]:
    """What stays of every group that a plan names, but for those in layers that go."""
    gone = gone_layers(kept)
    return {name: positions for name, positions in kept.items() if name.rpartition(".")[0] not in gone}


def _is_layer(name: str) -> bool:
    return name.count(".") == 2 and UnitName.parse(name).units == UNITS
