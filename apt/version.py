"""The version of this package, and what a result was made with: packages, and the commit of a source tree."""

import importlib.metadata
import platform
import shutil
import subprocess
from pathlib import Path

__version__ = "0.1.0"
TREE = Path(__file__).parent.parent


def versions_used(*more: str) -> dict[str, str]:
    """Version by name: this package and its commit, Python, torch, transformers, and `more` distributions."""
    commit = source_commit(TREE)
    return {
        "apt-lm": __version__,
        **({} if commit is None else {"commit": commit}),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("torch", "transformers", *more)},
    }


def source_commit(tree: Path) -> str | None:
    """The commit of a git checkout, "-dirty" where it has changes; None where it is none, or there is no git."""
    if not (tree / ".git").exists() or shutil.which("git") is None:
        return None
    command = ["git", "-C", str(tree), "describe", "--always", "--dirty", "--exclude", "*"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None
