"""Passes of gate, activation, norm and kurtosis on tensors that have shapes and no memory: for a stub driver."""

from itertools import product

import torch
from lora_launches import BF16, FP32, shape

from apt_kernels import activation, kurtosis, norms, statistics

KINDS = ("silu", "gelu", "gelu_tanh")
WIDTHS = (4096, 32)  # the two tiles of `statistics`
ROWS = [block for _, block, _ in norms.CONFIGS]  # a width for each tile of the norms
UNALIGNED = 3  # what makes each of these odd, with the same tile
T = 8192


def gate(D: int, dtype: torch.dtype = BF16, *, masked: bool = True, collect: bool = True) -> None:
    valid_T = shape(T) if collect else None
    statistics.gate_pass(shape(T, D, dtype=dtype), shape(D) if masked else None, valid_T, collect)


def gated_activation(D: int, dtype: torch.dtype = BF16, kind: str = "silu") -> None:
    x_TD, mask, valid_T = shape(T, D, dtype=dtype), shape(D), shape(T)
    activation.activation_forward(x_TD, x_TD, mask, valid_T, kind, True)
    activation.activation_backward(x_TD, x_TD, x_TD, mask, valid_T, kind, True, (True, True))


def plain_activation(D: int) -> None:
    x_TD, mask = shape(T, D, dtype=BF16), shape(D)
    activation.activation_forward(x_TD, None, mask, None, "silu", False)
    activation.activation_backward(x_TD, x_TD, None, mask, None, "silu", False, (True, False))


def norm_forward(D: int, dtype: torch.dtype = BF16, centred: bool = True) -> None:
    norms.norm_forward(shape(T, D, dtype=dtype), shape(D), shape(D), shape(D), 1e-5, centred)


def norm_backward(D: int, dtype: torch.dtype = BF16, centred: bool = True, *, weights: bool = False) -> None:
    """The gradient of x, or those of weight and bias."""
    x_TD, each_T = shape(T, D, dtype=dtype), shape(T)
    needs = (not weights, weights, weights)
    norms.norm_backward(x_TD, x_TD, shape(D), shape(D), each_T, each_T, centred, needs)


def weight_kurtosis(O: int, I: int, R: int | None, weight: torch.dtype = BF16, adapter: torch.dtype = FP32) -> None:
    a, b = (None, None) if R is None else (shape(R, I, dtype=adapter), shape(O, R, dtype=adapter))
    kurtosis.weight_kurtosis(shape(O, I, dtype=weight), a, b, 0.5, 1, shape(I))


def each_tile(machine: str) -> None:
    """In bfloat16, aligned, with all parts: every tile on sm_90, one on the other machines."""
    every = machine == "sm_90"
    for D in WIDTHS if every else WIDTHS[:1]:
        gate(D)
        gated_activation(D)
        norm_backward(D, weights=True)
    for D in ROWS if every else ROWS[:1]:
        norm_forward(D)
        norm_backward(D)
    norm_backward(ROWS[-1] - UNALIGNED)  # block by block
    weight_kurtosis(4096, 4096, 16)


def every_variant() -> None:
    """The parts that may be missing, the kinds, float32, and where nothing is aligned."""
    for D in WIDTHS:
        gate(D)
        gate(D, collect=False)
        gate(D, masked=False)
        gate(D - UNALIGNED, masked=False)
        gate(D, FP32, masked=False)
    for D, kind in product(WIDTHS, KINDS):
        gated_activation(D, kind=kind)
    plain_activation(WIDTHS[0])
    gated_activation(WIDTHS[0] - UNALIGNED, kind="gelu")
    gated_activation(WIDTHS[0], FP32, "gelu")
    for dtype, less in product((BF16, FP32), (0, UNALIGNED)):
        for D in WIDTHS:
            norm_backward(D - less, dtype, weights=True)
        for D, centred in product(ROWS, (True, False)):
            norm_forward(D - less, dtype, centred)
            norm_backward(D - less, dtype, centred)
    for R in (16, None):
        weight_kurtosis(4096, 4096, R)
        weight_kurtosis(4096, 4096, R, adapter=BF16)
        weight_kurtosis(4099, 4093, R, weight=FP32)
