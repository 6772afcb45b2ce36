"""The hidden dimensions of a model as one group of units: their gates put in, their members found, their exact cost."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from apt.adapters import APTAdapter, adapted, exchange
from apt.families import EmptyAttention, Family
from apt.families.hidden import Part, hidden_parts, hidden_size, hidden_table
from apt.fused import replace_module
from apt.gates import ValidTokens
from apt.hidden import HiddenGate, HiddenNorm, Narrow, ReadGate, Site, WriteSite
from apt.linears import features, is_conv1d, make_linear, weight_and_bias
from apt.units import Member, UnitGroup

NAME = "hidden"  # name and kind of the group


@dataclass(frozen=True)
class HiddenGroup:
    """All hidden dimensions of a model, one unit each."""

    gate: HiddenGate
    parts: tuple[Part, ...]  # of the patched model
    floor: int = 0  # dimensions that always stay

    name: str = NAME
    kind: str = NAME

    @property
    def num_units(self) -> int:
        return self.gate.num_units

    @property
    def members(self) -> list[Member]:
        """The adapted linears of the layers, each with the side that the dimensions own."""
        inside = [p for p in self.parts if p.layer is not None and isinstance(p.module, APTAdapter) and not p.aside]
        return [Member(part.module, axis, 1) for part in inside for axis in part.axes]  # type: ignore[arg-type]

    @property
    def vectors(self) -> list[Tensor]:
        """What the layers hold of the dimensions beside linears, ``[num_units]`` each: norms, biases that stayed."""
        norms = [part.module.view() for part in self.parts if isinstance(part.module, HiddenNorm) and part.layer]
        stayed = [(part.module.bias, None) for part in self.parts if isinstance(part.module, EmptyAttention)]
        return [vector for pair in [*norms, *stayed] for vector in pair if vector is not None]

    @property
    def writers(self) -> list[APTAdapter]:
        """Output and down projections of all layers, whose rows the dimensions own."""
        return [member.linear for member in self.members if member.axis == "out"]

    def trained(self) -> Iterator[nn.Parameter]:
        """What trains of its parts and has to follow a cut."""
        for part in self.parts:
            if isinstance(part.module, APTAdapter):
                yield from part.module.adapter_parameters()
            elif part.kind != "gate":
                yield from (p for p in part.module.parameters(recurse=False) if p.requires_grad)

    def cost(self) -> int:
        """Frozen parameters inside the layers that go with one dimension, at the present heads and neurons."""
        return sum(member.cost() for member in self.members) + len(self.vectors)

    def slope(self) -> int:
        """Dimensions are priced by what heads and neurons cost less without them."""
        return 0


Group = UnitGroup | HiddenGroup


def find_dimensions(model: nn.Module, family: Family, *, min_hidden: int = 0) -> HiddenGroup:
    """The hidden dimensions of a patched model at their present size.

    Raises:
        ValueError: they cannot be removed from this model; the text says why.
    """
    parts = hidden_parts(model, family)
    gate = next(part.module.hidden for part in parts if isinstance(part.module, HiddenNorm))
    return HiddenGroup(gate, tuple(parts), min(min_hidden, gate.num_units))


def hidden_group(model: nn.Module, family: Family | None) -> HiddenGroup | None:
    """The hidden dimensions of a patched model; None where their gates are not in."""
    gated = any(isinstance(module, HiddenNorm) for module in model.modules())
    return find_dimensions(model, family) if gated and family is not None else None


def has_dimensions(model: nn.Module, family: Family) -> bool:
    """Whether hidden dimensions can be removed from a plain or patched model."""
    try:
        hidden_parts(model, family)
    except ValueError:
        return False
    return True


def outer_linears(model: nn.Module, family: Family) -> list[str]:
    """Names of the linears outside the layers that read or write hidden dimensions."""
    parts = hidden_parts(model, family)
    return [part.name for part in parts if part.kind == "linear" and part.layer is None]


def place_dimensions(model: nn.Module, family: Family, valid: dict[str, ValidTokens]) -> None:
    """Put the gate of the hidden dimensions into a model whose linears are adapted already.

    Norms over hidden dimensions become `HiddenNorm`; modules that read an ungated stream, projections that write into
    it and embeddings get hooks.
    """
    parts, offset = hidden_parts(model, family), hidden_table(model).norm_offset
    writers = [part for part in parts if part.layer is not None and "out" in part.axes]
    num_sites = sum(part.site for part in parts) + len(writers)
    gate, places = HiddenGate(hidden_size(parts), num_sites, next(model.parameters()).device), iter(range(num_sites))

    def site(part: Part) -> Site:
        if part.layer is not None:
            return Site(next(places), valid[part.layer.stack.name])
        of_stack = [stack.name for stack in family.stacks if f"{stack.name}." in f".{part.name}"]
        return Site(next(places), valid[(of_stack or [family.stacks[-1].name])[0]])

    for part in parts:
        here = site(part) if part.site else None
        if part.kind == "norm":
            replace_module(model, part.name, HiddenNorm(part.module, gate, offset=offset, gated=part.gated, site=here))
        elif part.gated:
            part.module.register_forward_pre_hook(ReadGate(gate, here), with_kwargs=True)
        elif part.kind == "embedding":
            part.module.register_forward_hook(Narrow(gate))
    for part in writers:
        part.module.register_forward_hook(WriteSite(gate, site(part)))


def live_views(model: nn.Module, group: HiddenGroup | None) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Every parameter that may have a tail, with its live part; a tied one once. `group` None: linears alone."""
    owned: list[Any] = [module for _, module in adapted(model)]
    pairs = [(module.weight, module.view()[0]) for module in owned]
    pairs += [(module.bias, module.view()[1]) for module in owned]
    for part in group.parts if group is not None else ():
        module: Any = part.module
        if part.kind == "norm":
            pairs += zip((module.weight, module.bias), module.view(), strict=True)
        elif part.kind == "embedding" and group is not None:
            pairs.append((module.weight, module.weight[:, : group.num_units]))
    seen: set[int] = set()
    for stored, live in pairs:
        if stored is not None and id(stored) not in seen:
            seen.add(id(stored))
            yield stored, live


def remove_dimensions(model: nn.Module, family: Family) -> None:
    """Take out what `place_dimensions` put in; no parameter has a tail any more."""
    for part in find_dimensions(model, family).parts:
        if isinstance(part.module, HiddenNorm):
            replace_module(model, part.name, part.module.stock)
    for module in model.modules():
        # By the hooks themselves, as a copied model knows no handles of those that its surgery dropped.
        for table in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in table.items() if isinstance(hook, ReadGate | WriteSite | Narrow)]:
                del table[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)


def free_dimension_tails(group: HiddenGroup) -> None:
    """Give back what lies behind the live part of norms and embeddings; linears have a method for it."""
    for part in group.parts:
        module: Any = part.module
        if part.kind == "norm" and module.n < module.weight.numel():
            for parameter, live in zip((module.weight, module.bias), module.view(), strict=True):
                if parameter is not None:
                    exchange(parameter, live.detach().clone())
            fit_norm(module)
        elif part.kind == "embedding" and module.weight.shape[1] > group.num_units:
            exchange(module.weight, module.weight.detach()[:, : group.num_units].clone())
            module.embedding_dim = group.num_units
    group.gate.order = torch.arange(group.num_units, device=group.gate.order.device)


def outer_dims(group: HiddenGroup) -> dict[str, tuple[int, ...]]:
    """Which dimensions of the parameters outside the layers run over the stream: full name -> dimensions."""
    dims: dict[str, tuple[int, ...]] = {}
    for part in group.parts:
        if part.layer is None and part.kind in ("linear", "norm"):
            out = part.kind == "norm" or "out" in part.axes
            dims[f"{part.name}.weight"] = (0,) * out + (1,) * ("in" in part.axes)
            dims[f"{part.name}.bias"] = (0,) * out
    return dims


def resize_dimensions(model: nn.Module, family: Family, num: int) -> None:
    """Give an empty plain model (meta device) that many hidden dimensions; its numbers are loaded afterwards."""

    def narrow(module: Any, name: str, dim: int) -> None:
        parameter = getattr(module, name, None)
        if parameter is not None:
            shape = list(parameter.shape)
            shape[dim] = num
            setattr(module, name, nn.Parameter(parameter.new_empty(shape)))

    for part in hidden_parts(model, family):
        module: Any = part.module
        if part.kind == "norm":
            narrow(module, "weight", 0)
            narrow(module, "bias", 0)
            if isinstance(module, nn.LayerNorm):
                module.normalized_shape = (num,)
        elif part.kind == "embedding":
            narrow(module, "weight", 1)
            module.embedding_dim = num
        elif part.kind == "linear":
            replace_module(model, part.name, _narrow_linear(module, part.axes, num))


def _narrow_linear(linear: nn.Module, axes: tuple[str, ...], num: int) -> nn.Module:
    """A plain linear of the same kind with `num` inputs ("in") or outputs ("out"), without numbers."""
    (weight, bias), sizes = weight_and_bias(linear), list(features(linear))
    for axis in axes:
        sizes[0 if axis == "out" else 1] = num
    empty = None if bias is None else bias.new_empty(sizes[0])
    return make_linear(weight.new_empty(sizes), empty, conv1d=is_conv1d(linear))


def fit_norm(norm: HiddenNorm) -> None:
    """Tell the plain norm inside how wide its parameters are now."""
    if isinstance(norm.stock, nn.LayerNorm):
        norm.stock.normalized_shape = (norm.weight.numel(),)
