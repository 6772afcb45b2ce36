"""Unit masks as modules: where a unit is shut, and where its statistics are collected."""

import torch
from torch import Tensor, nn

import apt_kernels
from apt.layers.passes import ValidTokens
from apt.layers.unit_sums import add_products, add_squares, add_total, start, token_sum


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
    # [2, D], sums over tokens of |h| and |dL/dy|; with `products` of |h dL/dy| and h dL/dy; with `squares` of squares
    sums: Tensor
    blocks: Tensor | None  # [2, num_units, unit_size, unit_size], with `squares` of units with several features
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
        self.squares = False
        self.totals = False  # collects `total` too
        self._masked = False  # whether any mask differs from 1, kept here so that no step asks the device
        self._starter = torch.zeros((), requires_grad=True)  # belongs to no optimizer and gets no gradient
        self.register_buffer("blocks", None, persistent=False)
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
        self.blocks = None
        self.total.zero_()
        self.count.zero_()

    def keep(self, kept: Tensor) -> None:
        """Drop all units but those at the positions `kept`; the masks of those are 1 from here on."""
        self.values = torch.ones(kept.numel(), device=self.values.device)
        self.sums = torch.zeros(2, kept.numel() * self.unit_size, device=self.sums.device)
        self.total = torch.zeros(kept.numel() * self.unit_size, device=self.total.device)
        self.count.zero_()
        self.blocks = None
        self._masked = False

    @property
    def collects(self) -> bool:
        """Whether a pass at this moment leaves statistics."""
        return self.collecting and torch.is_grad_enabled() and self.num_units > 0

    @property
    def collects_sums(self) -> bool:
        """Whether it leaves `sums` and no other statistics: those that `apt_kernels.gate` collects."""
        return self.collects and not (self.products or self.squares or self.totals)

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
        return add_total(y, token_sum(h.detach(), self.valid.of(h)), self.total) if self.totals else y

    def collect(self, h: Tensor, mask: Tensor | None, sums: Tensor, count: Tensor, valid: ValidTokens) -> Tensor:
        """``h * mask``, whose backward adds the statistics to `sums` ``[2, D]`` and `count`."""
        if not h.requires_grad:  # the units count as much where no adapter stands before them
            h = start(h, self._starter)
        if not (self.products or self.squares):
            return apt_kernels.gate(h, mask, sums=sums, count=count, valid=valid.of(h))
        y = h if mask is None else apt_kernels.gate(h, mask)
        if self.squares:
            return add_squares(y, h.detach(), sums, self._open_blocks(), count, valid.of(h))
        return add_products(y, h.detach(), sums, count, valid.of(h))

    def _open_blocks(self) -> Tensor | None:
        """Room for the products inside units; hidden dimensions, and other units of one feature, have none."""
        if self.blocks is None and self.unit_size > 1:
            size = (2, self.num_units, self.unit_size, self.unit_size)
            self.blocks = torch.zeros(size, device=self.sums.device, dtype=self.sums.dtype)
        return self.blocks

    def extra_repr(self) -> str:
        return f"num_units={self.num_units}, unit_size={self.unit_size}"
