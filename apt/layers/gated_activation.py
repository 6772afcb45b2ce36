"""The gated activation of a feed-forward block as one op, inside the block's own forward."""

import copy
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

import apt_kernels
from apt.families import FFN, Anatomy
from apt.families.base import find_module
from apt.families.linears import replace_module
from apt.layers.adapter import APTAdapter, PastMask

Kind = Literal["silu", "gelu", "gelu_tanh"]

KINDS: dict[Kind, Callable[[Tensor], Tensor]] = {  # of `apt_kernels.gated_activation`: what it computes
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda g: nn.functional.gelu(g, approximate="tanh"),
}


class GatedActivation(nn.Module):
    """Stands where a gated block has its activation, and makes ``act(g) * u * mask`` one op where a kernel is chosen.

    The block's forward writes ``act(gate(x)) * up(x)`` and gives the product to the down projection. Called with g,
    this module answers with an object that waits for u; multiplied with it, that runs `apt_kernels.gated_activation`
    with the mask before the down projection and its statistics; the projection is told that its input has passed it.
    Where eager runs, and while torch.compile traces, it is the activation itself.

    Args:
        act: the activation, an elementwise module of the kind.
        kind: as `kind_of` found it.
        down: the projection that reads the product and holds the mask.
    """

    def __init__(self, act: nn.Module, kind: Kind, down: APTAdapter) -> None:
        super().__init__()
        self.act = act
        self.kind = kind
        object.__setattr__(self, "down", down)  # no child of this module: it has its place in the block
        self.down: APTAdapter
        self.past_mask = PastMask()
        down.past_mask = self.past_mask

    def forward(self, g: Tensor) -> "Tensor | _Waiting":
        self.past_mask.tensor = None
        if torch.compiler.is_compiling() or apt_kernels.chosen("gated_activation", g, _sizes(g)) == "torch":
            return self.act(g)
        return _Waiting(self, g)

    def product(self, g: Tensor, u: Tensor) -> Tensor:
        """``act(g) * u``, and past the mask where the op does all that the mask is asked for."""
        mask = self.down.unit_mask
        learns = g.requires_grad or u.requires_grad
        if mask is None or not (mask.only_masks or (mask.collects_sums and learns)):
            return apt_kernels.gated_activation(g, u, kind=self.kind)  # the mask, if any, has its own way
        y = apt_kernels.gated_activation(
            g,
            u,
            mask.feature_mask() if mask.masked else None,
            kind=self.kind,
            sums=mask.sums if mask.collects else None,
            count=mask.count if mask.collects else None,
            valid=mask.valid.of(g) if mask.collects else None,
        )
        self.past_mask.tensor = y
        return y

    def extra_repr(self) -> str:
        return f"kind={self.kind!r}"


class _Waiting:
    """``act(g)`` on its way to u."""

    def __init__(self, activation: GatedActivation, g: Tensor) -> None:
        self.activation = activation
        self.g = g

    def __mul__(self, u: Tensor) -> Tensor:
        return self.activation.product(self.g, u)

    __rmul__ = __mul__


def _sizes(g: Tensor) -> tuple[int, int]:
    return g.shape[:-1].numel(), g.shape[-1]


def kind_of(act: nn.Module) -> Kind | None:
    """Which kind of `apt_kernels.gated_activation` a module computes, by what it makes of a few numbers."""
    with torch.no_grad(), unset_fake_temporarily():  # in a model of fake tensors too these numbers are real
        g = torch.linspace(-6.0, 6.0, 49, dtype=torch.float64)
        y = copy.deepcopy(act)(g)
        found = (kind for kind, function in KINDS.items() if torch.allclose(y, function(g), rtol=0, atol=1e-8))
        return next(found, None)


def put_activations(anatomy: Anatomy) -> None:
    """Let the gated blocks of a patched model, where the family's table names their activation, be one op each."""
    for part in anatomy.parts:
        if not isinstance(part.table, FFN) or part.table.act is None:
            continue
        layer = part.layer.module
        act = find_module(layer, part.table.act)
        kind = None if act is None else kind_of(act)  # a block of Liger's has no activation
        down = part.reader
        if act is not None and kind is not None and isinstance(down, APTAdapter):
            replace_module(layer, part.table.act, GatedActivation(act, kind, down))


def restore_activations(model: nn.Module) -> None:
    """Put the activations themselves back."""
    for name, module in list(model.named_modules()):
        if isinstance(module, GatedActivation):
            replace_module(model, name, module.act)
