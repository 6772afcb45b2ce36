"""Statistics that a backward pass adds on its way: identities to autograd, with sums as their side effect."""

from typing import Any

import torch
from torch import Tensor

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


class _Squares(torch.autograd.Function):
    """Hands y on; backward adds the sums of h^2 and of (dL/dy)^2, and of neighbouring features their products.

    `sums` is ``[2, D]``; `blocks` ``[2, units, d, d]``, or None, holds the token sums of ``h h^T`` and ``g g^T`` inside
    each unit. What is kept of h until then are its sums.
    """

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, h: Tensor, sums: Tensor, blocks: Tensor | None, count: Tensor, valid: Tensor | None
    ) -> Tensor:
        ctx.valid = valid
        ctx.kept = (sums, blocks, count)
        ctx.of_h = _second_moments(h, valid, blocks)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        sums, blocks, count = ctx.kept
        of_grad = _second_moments(grads[0], ctx.valid, blocks)
        for side, (squares, products) in enumerate((ctx.of_h, of_grad)):
            sums[side] += squares
            if blocks is not None:
                blocks[side] += products
        tokens = grads[0].shape[:-1].numel()
        count.add_(tokens if ctx.valid is None else ctx.valid.sum(dtype=count.dtype))
        return grads[0], None, None, None, None, None


@outside_autocast
def _second_moments(h: Tensor, valid: Tensor | None, blocks: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Token sums of the squares of h, ``[D]``, and of the products inside units, as `blocks` has them."""
    h_TD = h.detach().reshape(-1, h.shape[-1])
    h_TD = h_TD.to(torch.promote_types(h.dtype, torch.float32))
    if valid is not None:
        h_TD = h_TD * valid.reshape(-1, 1)
    if blocks is None:
        return h_TD.square().sum(0), None
    h_UTd = h_TD.unflatten(-1, blocks.shape[1:3]).transpose(0, 1)
    products = h_UTd.transpose(1, 2) @ h_UTd
    return products.diagonal(dim1=1, dim2=2).flatten(), products


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


def add_products(y: Tensor, h: Tensor, sums_2D: Tensor, count: Tensor, valid: Tensor | None) -> Tensor:
    return _Products.apply(y, h, sums_2D, count, valid)


def add_squares(
    y: Tensor, h: Tensor, sums: Tensor, blocks: Tensor | None, count: Tensor, valid: Tensor | None
) -> Tensor:
    return _Squares.apply(y, h, sums, blocks, count, valid)


def add_total(y: Tensor, vector_D: Tensor, total_D: Tensor) -> Tensor:
    return _Total.apply(y, vector_D, total_D)


def start(h: Tensor, starter: Tensor) -> Tensor:
    return _Start.apply(h, starter)


# A backward of their own, as some ops of apt_kernels have.
WITH_BACKWARD = (add_products, add_squares, add_total, start)


@outside_autocast
def token_sum(h: Tensor, valid: Tensor | None) -> Tensor:
    """Sum over the valid tokens of h, ``[D]`` in at least float32."""
    h_TD = h.reshape(-1, h.shape[-1])
    wide = torch.promote_types(h.dtype, torch.float32)
    return h_TD.sum(0, dtype=wide) if valid is None else valid.reshape(-1).to(wide) @ h_TD.to(wide)
