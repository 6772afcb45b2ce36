"""The layers of a model that lost some, numbered anew: of tensors, of unit groups, in the config."""

from dataclasses import dataclass
from typing import Any

from apt.families import Anatomy

PER_LAYER = ("layer_types",)  # settings of a config that list something layer by layer


@dataclass(frozen=True)
class Renumbering:
    """The names that an export gives to what lies in layers; the same ones where no layer went."""

    paths: dict[str, str]  # of layers, in full
    layers: dict[str, str]  # "layers.3": "layers.2"

    @classmethod
    def of(cls, anatomy: Anatomy | None) -> "Renumbering":
        """The names in an export of a model; without a family nothing is renamed."""
        paths: dict[str, str] = {}
        layers: dict[str, str] = {}
        counts: dict[str, int] = {}
        for layer in [] if anatomy is None else anatomy.layers:
            if layer.gone:
                continue
            stack = layer.stack.name
            number = counts.get(stack, 0)
            counts[stack] = number + 1
            layers[layer.name] = f"{stack}.{number}"
            paths[layer.path] = f"{layer.path.rpartition('.')[0]}.{number}"
        return cls(paths, layers)

    def tensor(self, name: str) -> str:
        """The new name of a tensor."""
        place = name
        while place and place not in self.paths:
            place = place.rpartition(".")[0]
        return self.paths[place] + name[len(place) :] if place else name

    def units(self, name: str) -> str:
        """The new name of a unit group."""
        layer, _, units = name.rpartition(".")
        return f"{self.layers[layer]}.{units}"


def count_layers(config: Any, anatomy: Anatomy) -> None:
    """Write the number of layers that are left into a config, and take those that went out of its lists."""
    for stack in anatomy.stacks:
        left = [not layer.gone for layer in anatomy.layers if layer.stack == stack]
        if all(left):
            continue
        for name in PER_LAYER:
            listed = getattr(config, name, None)
            if listed is not None:
                setattr(config, name, [entry for entry, stays in zip(listed, left, strict=True) if stays])
        setattr(config, stack.setting, sum(left))
