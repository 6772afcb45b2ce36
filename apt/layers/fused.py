"""One stored projection that holds several linears: split while the model is patched, joined again afterwards."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from apt.families import Anatomy, PlacedPart
from apt.families.base import find_module
from apt.families.linears import features, is_conv1d, is_linear, make_linear, replace_module, weight_and_bias
from apt.layers.adapter import APTAdapter


class FusedLinears(nn.Module):
    """Stands where a model has one projection for q, k, v or gate, up: its parts, each a linear of its own.

    The block's forward calls it as it called the one projection, and gets the outputs side by side. The parts are
    children under the names of their roles, so each has a mask side, a rank and a size of its own.

    Args:
        parts: role -> plain linear, in the order in which their rows are stored.
        conv1d: whether the one projection was a `Conv1D`.

    Shapes: input ``[..., I]``, output ``[..., sum of O]``.
    """

    def __init__(self, parts: Mapping[str, nn.Module], conv1d: bool) -> None:
        super().__init__()
        self.conv1d = conv1d
        for role, part in parts.items():
            self.add_module(role, part)

    @property
    def sizes(self) -> list[int]:
        """Outputs of each part."""
        return [features(part)[0] for part in self.children()]

    @property
    def out_features(self) -> int:
        return sum(self.sizes)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.children()], dim=-1)

    def extra_repr(self) -> str:
        return f"conv1d={self.conv1d}"


def split_linear(linear: nn.Module, sizes: Mapping[str, int]) -> FusedLinears:
    """The parts of a fused projection: role -> number of its outputs, in the order in which they are stored."""
    weight_OI, bias_O = weight_and_bias(linear)
    assert sum(sizes.values()) == weight_OI.shape[0], f"{dict(sizes)} are not the {weight_OI.shape[0]} outputs"
    biases = [None] * len(sizes) if bias_O is None else bias_O.detach().split(list(sizes.values()))
    # Copies: rows that shared one storage would keep all of it alive, and safetensors refuses them.
    parts = {
        role: make_linear(rows.clone(), None if bias is None else bias.clone())
        for role, rows, bias in zip(sizes, weight_OI.detach().split(list(sizes.values())), biases, strict=True)
    }
    return FusedLinears(parts, is_conv1d(linear))


def split_fused(anatomy: Anatomy, names: Collection[str] | None = None) -> None:
    """Put a `FusedLinears` in the place of every fused projection of a family's table, or of those named in full."""
    for name, part in fused_places(anatomy).items():
        if names is None or name in names:
            linear = anatomy.model.get_submodule(name)
            replace_module(anatomy.model, name, split_linear(linear, part_sizes(linear, part)))


def fused_places(anatomy: Anatomy) -> dict[str, PlacedPart]:
    """Full name of each fused projection that is still one -> the part where it is. Without heads it is gone."""
    found = {}
    for part in anatomy.parts:
        if part.fused_path is not None and is_linear(find_module(anatomy.model, part.fused_path)):
            found[part.fused_path] = part
    return found


def part_sizes(linear: nn.Module, part: PlacedPart) -> dict[str, int]:
    """Outputs of each role: of q as many as the output projection reads, of the others the rest in equal shares."""
    rest, _ = features(linear)
    sizes = {}
    roles = part.table.same_input
    if "q" in roles:
        _, sizes["q"] = features(part.linears["o"])
        rest -= sizes["q"]
    others = [role for role in roles if role != "q"]
    return sizes | dict.fromkeys(others, rest // len(others))


def plain_linear(module: APTAdapter | FusedLinears, merge: bool) -> nn.Module:
    """The ordinary layer that a module of ours stands for, at its present size, with or without the adapters' part."""
    if isinstance(module, APTAdapter):
        weight, bias = module.view()
        own = not (merge and module.rank)
        layer: Any = make_linear(weight if own else module.merged_weight(), bias, conv1d=module.conv1d)
        if own and weight is module.weight and not is_conv1d(layer):  # itself: it may be tied to another module's
            layer.weight, layer.bias = module.weight, module.bias
        made: nn.Module = layer
        return made
    plain = [plain_linear(part, merge) if isinstance(part, APTAdapter) else part for part in module.children()]
    weights, biases = zip(*map(weight_and_bias, plain), strict=True)
    there = [bias.detach() for bias in biases if bias is not None]
    weight = torch.cat([weight.detach() for weight in weights])
    return make_linear(weight, torch.cat(there) if there else None, conv1d=module.conv1d)


def scaled_factors(module: nn.Module) -> tuple[Tensor, Tensor]:
    """A ``[R, I]`` and ``s B`` ``[O, R]`` of what stands for one plain linear, R = 0 where there is no adapter.

    The parts of a fused one have ranks of their own: A lists them one after the other, B is zero outside their rows.
    """
    if isinstance(module, APTAdapter):
        a, b = module.factors()
        return a, module.scale * b
    if isinstance(module, FusedLinears):
        factors = [scaled_factors(part) for part in module.children()]
        return torch.cat([a for a, _ in factors]), torch.block_diag(*[b for _, b in factors])
    outputs, inputs = features(module)
    return torch.zeros(0, inputs), torch.zeros(outputs, 0)


def replaced(model: nn.Module) -> Iterator[tuple[str, APTAdapter | FusedLinears]]:
    """What stands for one plain linear each, with the name of that: a split projection as a whole."""
    inside: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, FusedLinears):
            inside.update(map(id, module.children()))
            yield name, module
        elif isinstance(module, APTAdapter) and id(module) not in inside:
            yield name, module


def restore_plain(model: nn.Module, *, merge: bool) -> None:
    """Put the ordinary layers back."""
    for name, module in list(replaced(model)):
        replace_module(model, name, plain_linear(module, merge))
