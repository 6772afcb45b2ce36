"""Hidden dimensions as modules: one mask for the whole model, the norms that know it, the places where it is read.

The residual stream itself is never masked: over L layers a mask m would compound. What a layer *reads* of it is, once:
behind a norm whose output is only read (pre-norm models), or at the reading module itself (post-norm models). Norms
weigh their statistics by the mask, so that they are the dense norm at 1, the norm of the kept dimensions at 0 and 1,
and continuous between (method.md 4.3).
"""

from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

import apt_kernels
from apt.layers.passes import ValidTokens
from apt.layers.unit_mask import UnitMask

SITES = ("read", "write")
OWN = ("stock", "training", "kind", "eps", "n", "masks_output", "site")  # of a `HiddenNorm`, and of no kernel


@dataclass(frozen=True)
class Site:
    """A place that collects statistics: its row among them, and the padding mask of the tokens that pass it."""

    index: int
    valid: ValidTokens


class HiddenMask(UnitMask):
    """The mask of all hidden dimensions of a model, and their statistics at each site, which the sites share.

    It costs nothing until the controller sets `collecting` or a mask leaves 1.

    Args:
        num_units: hidden dimensions D.
        num_sites: places that collect, reads and writes.
    """

    sums: Tensor  # [sites, 2, D]
    count: Tensor  # [sites]
    order: Tensor  # [stored], where each dimension that the weights store stood when there was no tail

    def __init__(self, num_units: int, num_sites: int, device: torch.device | None = None) -> None:
        super().__init__(num_units, 1, ValidTokens(), device, kind="hidden")
        self.sites = "read"  # which of `SITES` collect
        self.dense = False  # a teacher's pass: full widths, no mask, no statistics
        self.sums = torch.zeros(num_sites, 2, num_units, device=device)
        self.count = torch.zeros(num_sites, device=device)
        self.register_buffer("order", torch.arange(num_units, device=device), persistent=False)

    def keep(self, kept: Tensor, order: Tensor | None = None) -> None:
        """Drop all dimensions but those at the positions `kept`.

        Args:
            kept: ascending.
            order: positions of all dimensions that the weights store, in their new order, where a tail stays.
        """
        num_sites = self.count.numel()
        device = self.sums.device
        super().keep(kept)
        self.order = torch.arange(kept.numel(), device=device) if order is None else self.order[order]
        self.sums = torch.zeros(num_sites, 2, kept.numel(), device=device)
        self.count = torch.zeros(num_sites, device=device)

    def collects_at(self, sites: str) -> bool:
        """Whether sites of that kind collect in the pass in flight."""
        return self.collecting and self.sites == sites and not self.dense and torch.is_grad_enabled()

    def read(self, h: Tensor, site: Site | None) -> Tensor:
        """What is read of h: ``h * mask``; with a site, its statistics are collected too."""
        mask = self.values if self.masked and not self.dense else None
        if site is not None:
            return self.collect(h, mask, self.sums[site.index], self.count[site.index], site.valid)
        return h if mask is None else apt_kernels.gate(h, mask)

    def forward(self, h: Tensor) -> Tensor:
        return self.read(h, None)


class HiddenNorm(nn.Module):
    """Takes the place, the parameters and their names of a LayerNorm or RMSNorm over hidden dimensions.

    While no mask differs from 1 it is that norm. Retained dimensions stand first in its parameters; `n` says how many.

    Args:
        stock: the norm.
        hidden: the model's mask.
        offset: added to the weight of an RMSNorm.
        masks_output: whether the output is only read, so that it is masked too.
        site: where its statistics go; None collects none.
    """

    weight: nn.Parameter  # [D]
    bias: nn.Parameter | None  # [D]
    stock: nn.Module

    def __init__(
        self,
        stock: nn.Module,
        hidden: HiddenMask,
        *,
        offset: float = 0.0,
        masks_output: bool = False,
        site: Site | None = None,
    ) -> None:
        super().__init__()
        norm: Any = stock
        self.weight, self.bias = norm.weight, getattr(norm, "bias", None)
        self.kind: Any = "layer" if isinstance(stock, nn.LayerNorm) else "rms"
        self.eps = float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)
        self.n = norm.weight.numel()
        self.offset = offset
        self.masks_output = masks_output
        self.site = site
        self.hidden = hidden
        # Not registered, or its parameters would have two names.
        object.__setattr__(self, "stock", stock)

    def view(self) -> tuple[Tensor, Tensor | None]:
        """The live part of weight and bias, ``[n]``."""
        return self.weight[: self.n], None if self.bias is None else self.bias[: self.n]

    def set_width(self, width: int) -> None:
        """Say how many dimensions are live, and tell the stock norm how wide its parameters are."""
        self.n = width
        if isinstance(self.stock, nn.LayerNorm):
            self.stock.normalized_shape = (self.weight.numel(),)

    def live_params(self) -> int:
        """Numbers in the live part of weight and bias."""
        return self.n if self.bias is None else 2 * self.n

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.hidden
        n = self.weight.numel() if hidden.dense else self.n
        masked = hidden.masked and not hidden.dense
        site = self.site if self.masks_output and hidden.collects_at("read") else None
        whole = self.weight.numel() == n and self.stock.weight is self.weight  # a teacher may have put its own here
        if not masked and whole and x.shape[-1] == n:
            y: Tensor = self.stock(x)
        else:
            folded = masked and self.masks_output and site is None  # the mask costs nothing in weight and bias
            y = self._weighted(x[..., :n], hidden.values if masked else None, folded)
            if folded:
                return y
        return hidden.read(y, site) if self.masks_output else y

    def _weighted(self, x: Tensor, mask: Tensor | None, folded: bool) -> Tensor:
        n = x.shape[-1]
        weight, bias = self.weight[:n], None if self.bias is None else self.bias[:n]
        if self.offset:
            weight = weight.to(torch.promote_types(weight.dtype, torch.float32)) + self.offset
        if folded and mask is not None:
            weight, bias = weight * mask, None if bias is None else bias * mask
        return apt_kernels.masked_norm(x, weight, bias, mask=mask, eps=self.eps, kind=self.kind)

    def extra_repr(self) -> str:
        return f"{self.n}, kind={self.kind}, eps={self.eps}, masks_output={self.masks_output}"


def hand_on_kernels(model: nn.Module) -> None:
    """Give each stock norm the forward that another library has bound to the `HiddenNorm` in its place since.

    Liger does so on a model that is patched already, as `transformers.Trainer` applies it; bound to the `HiddenNorm` it
    would pass the mask and the pruned widths by.
    """
    for module in model.modules():
        bound = module.__dict__.pop("forward", None) if isinstance(module, HiddenNorm) else None
        if bound is None:
            continue
        stock: Any = module.stock
        for name in ("_get_name", "extra_repr"):
            module.__dict__.pop(name, None)
        for name, value in vars(module).items():  # the settings of its kernel
            if not name.startswith("_") and name not in OWN:
                setattr(stock, name, value)
        stock.forward = MethodType(bound.__func__, stock)


class ReadMask:
    """Forward pre-hook of a module that reads an unmasked stream: masks its first argument."""

    def __init__(self, hidden: HiddenMask, site: Site | None) -> None:
        self.hidden = hidden
        self.site = site

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        site = self.site if self.hidden.collects_at("read") else None
        if site is None and not self.hidden.masked:
            return None
        if args:
            return (self.hidden.read(args[0], site), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": self.hidden.read(kwargs["hidden_states"], site)}


class WriteSite:
    """Forward hook of a module that writes into the stream: collects what it writes, and changes nothing."""

    def __init__(self, hidden: HiddenMask, site: Site) -> None:
        self.hidden = hidden
        self.site = site

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        hidden = self.hidden
        index = self.site.index
        if not hidden.collects_at("write"):
            return None
        return hidden.collect(output, None, hidden.sums[index], hidden.count[index], self.site.valid)


class Narrow:
    """Forward hook of an embedding: hands on the retained dimensions, which stand first in its rows."""

    def __init__(self, hidden: HiddenMask) -> None:
        self.hidden = hidden

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if self.hidden.dense or output.shape[-1] == self.hidden.num_units:
            return None
        return output[..., : self.hidden.num_units]
