"""The modules that take a place in a model: adapted linears, unit masks, norms over what stays, split projections."""

from apt.layers.adapter import APTAdapter, adapted, exchange
from apt.layers.delta import Delta, RowGate
from apt.layers.shared_input import SharedInput, share_input
from apt.layers.transform import TRANSFORM, LayerTransform

__all__ = [
    "TRANSFORM",
    "APTAdapter",
    "Delta",
    "LayerTransform",
    "RowGate",
    "SharedInput",
    "adapted",
    "exchange",
    "share_input",
]
