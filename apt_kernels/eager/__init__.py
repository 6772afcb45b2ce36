"""Eager PyTorch implementations with hand-written backward: the path wherever no kernel is proven faster.

Each does the fewest passes over the large tensors and saves as little as it can.
"""

from apt_kernels.eager.activation import GatedActivation, activation_backward, activation_forward
from apt_kernels.eager.group import LoraLinears, lora_linears, lora_linears_backward
from apt_kernels.eager.linear import MaskedLoraLinear, lora_linear, lora_linear_backward
from apt_kernels.eager.norms import MaskedNorm, norm_backward, norm_forward, norm_share
from apt_kernels.eager.statistics import Gate, collect, column_sums, weight_kurtosis

__all__ = [
    "Gate",
    "GatedActivation",
    "LoraLinears",
    "MaskedLoraLinear",
    "MaskedNorm",
    "activation_backward",
    "activation_forward",
    "collect",
    "column_sums",
    "lora_linear",
    "lora_linear_backward",
    "lora_linears",
    "lora_linears_backward",
    "norm_backward",
    "norm_forward",
    "norm_share",
    "weight_kurtosis",
]
