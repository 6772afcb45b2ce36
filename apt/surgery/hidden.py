"""Puts the mask of the hidden dimensions into a model, and takes it out again."""

from torch import nn

from apt.families import Family
from apt.families.hidden_tables import Part, hidden_parts, hidden_size, hidden_table
from apt.families.linears import replace_module
from apt.layers.gates import ValidTokens
from apt.layers.hidden import HiddenGate, HiddenNorm, Narrow, ReadGate, Site, WriteSite
from apt.pruning.dimensions import find_dimensions


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
