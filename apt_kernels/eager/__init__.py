"""Eager PyTorch implementations with hand-written backward: the path wherever no kernel is proven faster.

Each does the fewest passes over the large tensors and saves as little as it can. Where the kernels have a function of
the same name, it takes and gives the same.
"""

from apt_kernels.eager.activation import activation_backward, activation_forward
from apt_kernels.eager.group import LoraLinears, lora_linears, lora_linears_backward
from apt_kernels.eager.linear import MaskedLoraLinear, lora_linear, lora_linear_backward
from apt_kernels.eager.norms import MaskedNorm, norm_backward, norm_forward
from apt_kernels.eager.statistics import column_sums, gate_pass, weight_kurtosis

__all__ = [
    "LoraLinears",
    "MaskedLoraLinear",
    "MaskedNorm",
    "activation_backward",
    "activation_forward",
    "column_sums",
    "gate_pass",
    "lora_linear",
    "lora_linear_backward",
    "lora_linears",
    "lora_linears_backward",
    "norm_backward",
    "norm_forward",
    "weight_kurtosis",
]
