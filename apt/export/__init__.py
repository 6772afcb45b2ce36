"""A finished model to a folder that others load, and back: merged, shrunk, safetensors and JSON only."""

from apt.export.files import CARD, FORMAT, WEIGHTS
from apt.export.merged import merged_state
from apt.export.read import load_model
from apt.export.write import export_model

__all__ = [
    "CARD",
    "FORMAT",
    "WEIGHTS",
    "export_model",
    "load_model",
    "merged_state",
]
