"""Public ops, one file a family. They check, choose an implementation and count it; they compute nothing."""

from apt_kernels.ops.activation import gated_activation
from apt_kernels.ops.group import masked_lora_linears
from apt_kernels.ops.linear import masked_lora_linear
from apt_kernels.ops.norms import masked_norm
from apt_kernels.ops.statistics import column_sums, gate, weight_kurtosis

__all__ = [
    "column_sums",
    "gate",
    "gated_activation",
    "masked_lora_linear",
    "masked_lora_linears",
    "masked_norm",
    "weight_kurtosis",
]
