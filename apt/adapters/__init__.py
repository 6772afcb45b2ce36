"""The adapted linear layer, what may stand in for its A and B, and those that share an input."""

from apt.adapters.delta import Delta, RowGate
from apt.adapters.layer import APTAdapter, adapted, exchange
from apt.adapters.shared_input import SharedInput

__all__ = ["APTAdapter", "Delta", "RowGate", "SharedInput", "adapted", "exchange"]
