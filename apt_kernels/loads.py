"""Triton functions that kernels of several files share: what is loaded in float32 and stored in the target's dtype.

Every load is masked and gives 0 outside. Rows and strides are in elements.
"""

import triton
import triton.language as tl


@triton.jit
def load_vector(source, place, size):
    """Entries of a vector of this size, in float32."""
    return tl.load(source + place, mask=place < size, other=0.0).to(tl.float32)


@triton.jit
def load_tile(source, rows, stride, cols, inside):
    """A tile of a row-major matrix, in float32."""
    return tl.load(source + rows[:, None] * stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_tile(target, rows, stride, cols, tile, inside):
    """Store a tile into a row-major matrix, in its dtype."""
    tl.store(target + rows[:, None] * stride + cols[None, :], tile.to(target.dtype.element_ty), mask=inside)


@triton.jit
def dot(left, right, acc, WIDEN: tl.constexpr, PRECISION: tl.constexpr):
    """``acc + left @ right``, of operands in float32 where WIDEN; acc may be None."""
    if WIDEN:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, acc, input_precision=PRECISION)
