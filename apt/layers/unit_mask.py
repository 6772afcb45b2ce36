"""Unit masks as modules: where a unit is shut, and where its statistics are collected."""

from typing import Any

import torch
from torch import Tensor, nn

import apt_kernels
from apt.layers.passes import ValidTokens
from apt_kernels.autocast import outside_autocast


class _Products(torch.autograd.Function):
    """Hands y on; backward adds the token sums of ``|h dL/dy|`` and of ``h dL/dy``, for which it keeps h."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, h: Tensor, sums_2D: Tensor, count: Tensor, valid: Tensor | None) -> Tensor:
        ctx.save_for_backward(h)
        ctx.valid = valid
        ctx.sums_2D = sums_2D
        ctx.count = count
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (h,) = ctx.saved_tensors
        valid = ctx.valid
        wide = torch.promote_types(h.dtype, torch.float32)
        products_TD = (h.to(wide) * grads[0].to(wide)).reshape(-1, h.shape[-1])
        if valid is not None:
            products_TD = products_TD * valid.reshape(-1, 1)
        ctx.sums_2D[0].add_(products_TD.abs().sum(0))
        ctx.sums_2D[1].add_(products_TD.sum(0))
        ctx.count.add_(products_TD.shape[0] if valid is None else valid.sum(dtype=ctx.count.dtype))
        return grads[0], None, None, None, None


class _Total(torch.autograd.Function):
    """Hands y on; backward adds a vector to a total, so that a pass without one, or a recomputed one, adds nothing."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, vector_D: Tensor, total_D: Tensor) -> Tensor:
        ctx.vector_D = vector_D
        ctx.total_D = total_D
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        ctx.total_D += ctx.vector_D
        return grads[0], None, None


class _Start(torch.autograd.Function):
    """Hands h on with a gradient to be asked for, where nothing that trains stands before it; none flows back."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, starter: Tensor) -> Tensor:
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        return None, None


def _products(y: Tensor, h: Tensor, sums_2D: Tensor, count: Tensor, valid: Tensor | None) -> Tensor:
    return _Products.apply(y, h, sums_2D, count, valid)


def _total(y: Tensor, vector_D: Tensor, total_D: Tensor) -> Tensor:
    return _Total.apply(y, vector_D, total_D)


def _start(h: Tensor, starter: Tensor) -> Tensor:
    return _Start.apply(h, starter)


WITH_BACKWARD = (_products, _total, _start)  # a backward of their own, as some ops of apt_kernels have


@outside_autocast
def _token_sum(h: Tensor, valid: Tensor | None) -> Tensor:
    """Sum over the valid tokens of h, ``[D]`` in at least float32."""
    h_TD = h.reshape(-1, h.shape[-1])
    wide = torch.promote_types(h.dtype, torch.float32)
    return h_TD.sum(0, dtype=wide) if valid is None else valid.reshape(-1).to(wide) @ h_TD.to(wide)


class UnitMask(nn.Module):
    """Multiplies a feature vector by a unit mask and collects the salience statistics of its units.

    It costs nothing until the controller sets `collecting` or a mask leaves 1. Each unit owns `unit_size` neighbouring
    features (a head its head_dim, a KV group all its query heads, a neuron one).

    Args:
        num_units: of the site.
        unit_size: features of each.
        valid: the padding mask of the tokens that pass.
        device: of mask and statistics.
        kind: what the units are: a name of `apt.pruning.kinds.UNIT_KINDS`.

    Shapes: input and output ``[..., D]`` with ``D = num_units * unit_size``.
    """

    values: Tensor  # [num_units], 1 kept, 0 pruned, between while it decays
    sums: Tensor  # [2, D], sum over tokens of |h| and of |dL/dy|; with `products`, of |h dL/dy| and of h dL/dy
    total: Tensor  # [D], sum over tokens of h, signed; only with `totals`
    count: Tensor  # [], tokens counted

    def __init__(
        self,
        num_units: int,
        unit_size: int,
        valid: ValidTokens,
        device: torch.device | None = None,
        *,
        kind: str = "neuron",
    ) -> None:
        super().__init__()
        self.unit_size = unit_size
        self.kind = kind
        self.valid = valid
        self.collecting = False
        self.products = False  # which statistics are collected; products keep h until backward
        self.totals = False  # collects `total` too
        self._masked = False  # whether any mask differs from 1, kept here so that no step asks the device
        self._starter = torch.zeros((), requires_grad=True)  # belongs to no optimizer and gets no gradient
        # Not persistent: the checkpoint room saves them with the plan that gave them their size.
        self.register_buffer("values", torch.ones(num_units, device=device), persistent=False)
        self.register_buffer("sums", torch.zeros(2, num_units * unit_size, device=device), persistent=False)
        self.register_buffer("total", torch.zeros(num_units * unit_size, device=device), persistent=False)
        self.register_buffer("count", torch.zeros((), device=device), persistent=False)

    @property
    def num_units(self) -> int:
        return self.values.numel()

    @property
    def masked(self) -> bool:
        """Whether to multiply: any mask differs from 1; in a compiled graph, whether one may before the next event.

        So a graph lasts from event to event: which masks are all ones would otherwise be a graph each.
        """
        if torch.compiler.is_compiling() and self.collecting:
            return True
        return self._masked

    def set_mask(self, mask: Tensor) -> None:
        """Replace the mask; an all-ones mask switches the multiplication off."""
        self.values.copy_(mask)
        self._masked = bool((mask != 1).any())

    def reset_sums(self) -> None:
        self.sums.zero_()
        self.total.zero_()
        self.count.zero_()

    def keep(self, kept: Tensor) -> None:
        """Drop all units but those at the positions `kept`; the masks of those are 1 from here on."""
        self.values = torch.ones(kept.numel(), device=self.values.device)
        self.sums = torch.zeros(2, kept.numel() * self.unit_size, device=self.sums.device)
        self.total = torch.zeros(kept.numel() * self.unit_size, device=self.total.device)
        self.count.zero_()
        self._masked = False

    @property
    def collects(self) -> bool:
        """Whether a pass at this moment leaves statistics."""
        return self.collecting and torch.is_grad_enabled() and self.num_units > 0

    @property
    def collects_sums(self) -> bool:
        """Whether it leaves `sums` and no other statistics: those that `apt_kernels.gate` collects."""
        return self.collects and not (self.products or self.totals)

    @property
    def only_masks(self) -> bool:
        """Whether all it does at this moment is to multiply by `feature_mask`."""
        return self.masked and self.num_units > 0 and not self.collects

    def feature_mask(self) -> Tensor:
        """The mask of each feature, ``[D]``."""
        return self.values.repeat_interleave(self.unit_size)

    def forward(self, h: Tensor) -> Tensor:
        if self.only_masks:
            return apt_kernels.gate(h, self.feature_mask())
        if not self.collects:
            return h
        mask = self.feature_mask() if self.masked else None
        y = self.collect(h, mask, self.sums, self.count, self.valid)
        return _total(y, _token_sum(h.detach(), self.valid.of(h)), self.total) if self.totals else y

    def collect(self, h: Tensor, mask: Tensor | None, sums: Tensor, count: Tensor, valid: ValidTokens) -> Tensor:
        """``h * mask``, whose backward adds the statistics to `sums` ``[2, D]`` and `count`."""
        if not h.requires_grad:  # the units count as much where no adapter stands before them
            h = _start(h, self._starter)
        if not self.products:
            return apt_kernels.gate(h, mask, sums=sums, count=count, valid=valid.of(h))
        y = h if mask is None else apt_kernels.gate(h, mask)
        return _products(y, h.detach(), sums, count, valid.of(h))

    def extra_repr(self) -> str:
        return f"num_units={self.num_units}, unit_size={self.unit_size}"
