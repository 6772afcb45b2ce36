"""Prunable units: which rows and columns go together, and what each costs, exactly.

A head is a KV group: its rows of k and v, the rows of all its query heads in q, and their columns in o. A neuron is its
rows of the up (and gate) projection and its column of the down projection.
"""

from dataclasses import dataclass

from torch import nn

from apt.adapters import APTAdapter
from apt.families import Family
from apt.gates import MaskGate


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
    """All units of one kind in one layer."""

    name: str  # "layers.3.heads"
    kind: str  # "head" or "neuron"
    layer: int
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

    def cost(self) -> int:
        """Frozen parameters of one unit, adapters not counted."""
        return sum(member.cost() for member in self.members)


def head_size(model: nn.Module, family: Family, layer: nn.Module) -> int:
    """Features of one attention head."""
    attention = layer.get_submodule(family.attention)
    size = getattr(attention, "head_dim", None) or getattr(attention, "attention_head_size", None)
    assert isinstance(size, int), f"{type(attention).__name__} names no head size"
    return size


def required_heads(config: object, family: Family) -> set[int]:
    """Layers of a decoder that must keep a KV group: the first of each attention type.

    Cached generation reads the cache and mask lengths there.
    """
    if not family.decoder:
        return set()
    types = list(getattr(config, "layer_types", None) or [])
    return {0} | {types.index(kind) for kind in set(types)}


def find_units(model: nn.Module, family: Family, *, min_heads: int = 0, min_neurons: int = 0) -> list[UnitGroup]:
    """The unit groups of a patched model, layer by layer, heads before neurons, at their present sizes."""
    groups = []
    required = required_heads(getattr(model, "config", None), family)
    for index, layer in enumerate(family.layer_list(model)):
        linears: dict[str, APTAdapter] = {}
        for role, name in family.linears.items():
            try:
                module = layer.get_submodule(name)
            except AttributeError:  # the attention of this layer is gone
                continue
            assert isinstance(module, APTAdapter)
            linears[role] = module
        for kind, read, write, floor in (
            ("head", ("q", "k", "v"), "o", max(min_heads, int(index in required))),
            ("neuron", ("up", "gate"), "down", min_neurons),
        ):
            out = linears.get(write)
            if out is None or out.gate_in is None or out.gate_in.num_units == 0:
                continue
            gate = out.gate_in
            members = [Member(linears[r], "out", linears[r].n_out // gate.num_units) for r in read if r in linears]
            members.append(Member(out, "in", gate.unit_size))
            floor = min(floor, gate.num_units)
            groups.append(UnitGroup(f"layers.{index}.{kind}s", kind, index, gate, tuple(members), floor))
    return groups


def block_params(model: nn.Module, family: Family) -> int:
    """Weights and biases of attention, FFN and norms inside the layers that are live; adapters excluded."""
    total = 0
    for layer in family.layer_list(model):
        inside: set[int] = set()
        for module in layer.modules():
            if isinstance(module, APTAdapter):
                inside.update(id(p) for p in module.parameters(recurse=False))
                total += module.n_out * module.n_in + (0 if module.bias is None else module.n_out)
        total += sum(p.numel() for p in layer.parameters() if id(p) not in inside)
    return total
