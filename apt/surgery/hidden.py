"""Puts the mask of the hidden dimensions into a model, and takes it out again."""

from typing import Any

from torch import nn

from apt.families import Anatomy, EmptyAttention
from apt.families.hidden_parts import HiddenPart, hidden_size
from apt.families.linears import replace_module
from apt.layers.hidden import HiddenMask, HiddenNorm, Narrow, ReadMask, Site, WriteSite
from apt.layers.passes import ValidTokens


def place_dimensions(anatomy: Anatomy, valid: dict[str, ValidTokens]) -> None:
    """Put the mask of the hidden dimensions into a model whose linears are adapted already.

    Norms over hidden dimensions become `HiddenNorm`; modules that read an unmasked stream, projections that write into
    it and embeddings get hooks.
    """
    model = anatomy.model
    parts = anatomy.hidden_parts()
    stacks = [stack.name for stack in anatomy.family.stacks]
    writers = [part for part in parts if part.layer is not None and "out" in part.axes]
    num_sites = sum(part.site for part in parts) + len(writers)
    mask = HiddenMask(hidden_size(parts), num_sites, next(model.parameters()).device)
    places = iter(range(num_sites))

    def site(part: HiddenPart) -> Site:
        if part.layer is not None:
            return Site(next(places), valid[part.layer.stack.name])
        named = [stack for stack in stacks if f"{stack}." in f".{part.name}"]
        return Site(next(places), valid[(named or stacks[-1:])[0]])

    for part in parts:
        here = site(part) if part.site else None
        if part.kind == "norm":
            norm = HiddenNorm(
                part.module, mask, offset=anatomy.hidden_table.norm_offset, masks_output=part.masked, site=here
            )
            replace_module(model, part.name, norm)
        elif part.masked:
            part.module.register_forward_pre_hook(ReadMask(mask, here), with_kwargs=True)
        elif part.kind == "embedding":
            part.module.register_forward_hook(Narrow(mask))
    for part in writers:
        part.module.register_forward_hook(WriteSite(mask, site(part)))


def tell_width(part: HiddenPart, width: int) -> None:
    """Tell a part, whose tensors are cut, how many hidden dimensions are live. An `APTAdapter` is told by its cut."""
    module: Any = part.module
    if isinstance(module, HiddenNorm | EmptyAttention):
        module.set_width(width)
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = (width,)
    elif part.kind == "embedding":
        # What it stores, with the tail.
        module.embedding_dim = module.weight.shape[1]
    elif isinstance(module, nn.Linear):
        for axis in part.axes:
            setattr(module, "out_features" if axis == "out" else "in_features", width)


def remove_dimensions(anatomy: Anatomy) -> None:
    """Take out what `place_dimensions` put in; no parameter has a tail any more."""
    for part in anatomy.hidden_parts():
        if isinstance(part.module, HiddenNorm):
            replace_module(anatomy.model, part.name, part.module.stock)
    for module in anatomy.model.modules():
        # By the hooks themselves, as a copied model knows no handles of those that its surgery dropped.
        for table in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in table.items() if isinstance(hook, ReadMask | WriteSite | Narrow)]:
                del table[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
