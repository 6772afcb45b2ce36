"""Puts adapters and gates into a plain model, counts what is left of it, and takes them out again."""

from apt.patch.patch import patch_model, unpatch_model
from apt.patch.summary import Summary, summary
from apt.patch.targets import find_targets

__all__ = ["Summary", "find_targets", "patch_model", "summary", "unpatch_model"]
