"""Where the name of a model leads: a local folder or file, a package, or the hub."""

import importlib.util
from pathlib import Path

GGUF = ".gguf"
PACKAGE = "package:"


def resolve_model(name: str) -> str:
    """The local folder or GGUF file that a name means, of a package too; a name on the hub as it is.

    Raises:
        FileNotFoundError: there is no such folder or file.
        ImportError: the package is not installed.
    """
    if name.startswith(PACKAGE):
        return str(_package_path(name))
    path = Path(name).expanduser()
    if _is_local(name) and not (path.is_file() if name.endswith(GGUF) else path.is_dir()):
        raise FileNotFoundError(f"model: there is no {'file' if name.endswith(GGUF) else 'folder'} {name}")
    return str(path) if _is_local(name) else name


def _is_local(name: str) -> bool:
    """Whether a name is written as a path, which no name on the hub is."""
    return name.startswith((".", "~")) or Path(name).is_absolute()


def _package_path(name: str) -> Path:
    """The file or folder ``package:NAME/path`` inside an installed package, which is not imported."""
    package, _, inner = name.removeprefix(PACKAGE).partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    folders = None if spec is None else spec.submodule_search_locations
    if not folders:
        raise ImportError(
            f"{name} lies in a package that is not installed; pip install --no-deps {package.replace('_', '-')}"
        )
    path = Path(folders[0]) / inner
    if not path.exists():
        raise FileNotFoundError(f"{name}: the package {package} holds no {inner!r}")
    return path
