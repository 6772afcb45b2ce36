"""Tensor ops of the masked, adapted linear layer. Tensors in, tensors out; importable without triton."""

from apt_kernels.ops import (
    column_sums,
    gate,
    gated_activation,
    masked_lora_linear,
    masked_lora_linears,
    masked_norm,
    weight_kurtosis,
)
from apt_kernels.selection import backend_of, calls, chosen, reset_calls

# A backward of their own, where they run eagerly.
WITH_BACKWARD = (gate, gated_activation, masked_lora_linear, masked_lora_linears, masked_norm)

__all__ = [
    "backend_of",
    "calls",
    "chosen",
    "column_sums",
    "gate",
    "gated_activation",
    "masked_lora_linear",
    "masked_lora_linears",
    "masked_norm",
    "reset_calls",
    "weight_kurtosis",
]
