"""Prunable units: which rows and columns go together, and what each costs, exactly.

A head is a KV group: its rows of k and v, the rows of all its query heads in q, and their columns in o. A neuron is its
rows of the up (and gate) projection and its column of the down projection. Where these are, the family's table says.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from apt.families import FFN, Attention, Family, Layer
from apt.families.anatomy import part_linears, required_heads
from apt.layers import APTAdapter
from apt.layers.gates import MaskGate
from apt.layers.hidden import HiddenNorm


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

    name: str  # "layers.3.heads", "decoder.3.cross_heads"
    kind: str  # "head" or "neuron"
    layer: Layer
    part: Attention | FFN
    gate: MaskGate
    members: tuple[Member, ...]
    floor: int = 0  # units that always stay

    @property
    def num_units(self) -> int:
        return self.gate.num_units

    @property
    def reader(self) -> APTAdapter:
        """The projection that reads the units, whose columns they own: output or down."""
        return next(member.linear for member in self.members if member.axis == "in")

    def trained(self) -> Iterator[nn.Parameter]:
        """What trains of its members and has to follow a cut."""
        for member in self.members:
            yield from member.linear.adapter_parameters()

    def cost(self) -> int:
        """Frozen parameters of one unit, adapters not counted."""
        return sum(member.cost() for member in self.members)

    def slope(self) -> int:
        """What a unit costs less with one hidden dimension less: its features in the linears that join the stream."""
        return sum(member.width for member in self.members)


def find_units(model: nn.Module, family: Family, *, min_heads: int = 0, min_neurons: int = 0) -> list[UnitGroup]:
    """The unit groups of a patched model, layer by layer, heads before neurons, at their present sizes."""
    groups = []
    required, floors = required_heads(model, family), {"head": min_heads, "neuron": min_neurons}
    for layer in family.layers(model):
        for part in layer.stack.parts:
            linears = {role: m for role, m in part_linears(layer, part).items() if isinstance(m, APTAdapter)}
            gate = linears[part.reader].gate_in if part.reader in linears else None
            if gate is None or gate.num_units == 0:
                continue
            rows = [linears[role] for role in part.producers if role in linears]
            members = [Member(linear, "out", linear.n_out // gate.num_units) for linear in rows]
            members.append(Member(linears[part.reader], "in", gate.unit_size))
            name = f"{layer.name}.{part.units}"
            floor = min(max(floors[part.kind], int(name in required)), gate.num_units)
            groups.append(UnitGroup(name, part.kind, layer, part, gate, tuple(members), floor))
    return groups


def unit_gates(model: nn.Module, family: Family) -> dict[str, MaskGate | None]:
    """Every unit group of a patched model, with its gate; None where the projection went with its attention."""
    gates = {}
    for layer in family.layers(model):
        for part in layer.stack.parts:
            linear = part_linears(layer, part).get(part.reader)
            gates[f"{layer.name}.{part.units}"] = linear.gate_in if isinstance(linear, APTAdapter) else None
    return gates


def block_params(model: nn.Module, family: Family) -> int:
    """Weights and biases of attention, FFN and norms inside the layers that are live; adapters excluded."""
    total = 0
    for layer in family.layers(model):
        inside: set[int] = set()
        for module in layer.module.modules():
            if isinstance(module, APTAdapter | HiddenNorm):
                inside.update(id(p) for p in module.parameters())
                total += module.live_params()
        total += sum(p.numel() for p in layer.module.parameters() if id(p) not in inside)
    return total
