"""Tokens kept on disk: data that takes long to tokenise is tokenised once, not once a run."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from apt.files.telling import tell
from apt.files.whole import write_file_aside
from apt.runs.data.config import DataConfig

Columns = dict[str, list[Any]]  # each row a whole number, or a list of them
Make = Callable[[], Columns]
SLOW = 5_000_000  # characters: from here on tokenising takes seconds on one core (docs/decisions/0019-*)
LENGTHS = "/lengths"


def kept(
    config: DataConfig, tokenizer: Any, asks: dict[str, Any], texts: Iterable[Sequence[str]], make: Make
) -> Columns:
    """What `make` returns, from `config.cache` where it has been made before.

    The name of an entry is the hash of all that decides it: the texts, what is asked of them, the tokenizer, the code
    of this room, the versions of the libraries. An entry that is cut off or altered is made again, and a line says so.

    Args:
        config: where tokens are kept.
        tokenizer: of the model; tokens of one without a fast backend are not kept.
        asks: the settings that decide tokens, and the name of the loader.
        texts: one sequence of texts a column, in the order of the rows.
        make: tokenises; columns of whole numbers, or of lists of them.
    """
    columns = [list(column) for column in texts]
    if config.cache is None or sum(len(text) for column in columns for text in column) < SLOW:
        return make()
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        return make()
    name = _digest(tokenizer, asks, columns)
    path = _folder(config.cache) / f"{name}.safetensors"
    found = _read(path, name)
    if found is None:
        found = make()
        _write(path, name, found)
    return found


def _folder(setting: str) -> Path:
    if setting != "auto":
        return Path(setting).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "apt-lm" / "tokens"


def _digest(tokenizer: Any, asks: dict[str, Any], columns: list[list[str]]) -> str:
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend |= {"truncation": None, "padding": None}  # of its last call
    parts = {
        "code": _code(),
        "versions": [version("tokenizers"), version("transformers")],
        "tokenizer": [type(tokenizer).__name__, backend, _plain(tokenizer)],
        "asks": asks,
        "rows": [len(column) for column in columns],
    }
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    for column in columns:
        for text in column:
            content = text.encode("utf-8", "surrogatepass")
            digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


def _plain(tokenizer: Any) -> list[Any]:
    """What a tokenizer does beside its backend."""
    names = ("special_tokens_map", "model_input_names", "chat_template", "truncation_side", "padding_side")
    return [str(getattr(tokenizer, name, None)) for name in names]


@cache
def _code() -> str:
    """The hash of the source of this room: an entry of another version of it counts for nothing."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def _read(path: Path, name: str) -> Columns | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 -- it is no dict
            told = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        _tell(path, error)
        return None
    if told.get("name") != name or told.get("content") != _content(stored):
        _tell(path, "its content is not what was written")
        return None
    columns = [key for key in sorted(stored) if not key.endswith(LENGTHS)]
    return {column: _rows(stored[column], stored.get(column + LENGTHS)) for column in columns}


def _tell(path: Path, why: object) -> None:
    tell(f"the tokens kept in {path} are read no more ({why}); they are made again")


def _rows(flat: NDArray[Any], lengths: NDArray[Any] | None) -> list[Any]:
    values: list[Any] = flat.tolist()
    if lengths is None:
        return values
    ends = np.cumsum(lengths).tolist()
    return [values[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def _write(path: Path, name: str, columns: Columns) -> None:
    """Keep columns on disk. Where that fails, a line says so, and the next run tokenises again."""
    stored: dict[str, NDArray[Any]] = {}
    for column, rows in columns.items():
        if rows and isinstance(rows[0], list):
            stored[column + LENGTHS] = np.array([len(row) for row in rows], dtype=np.int64)
            stored[column] = np.concatenate([np.asarray(row, dtype=np.int32) for row in rows])
        else:
            stored[column] = np.array(rows, dtype=np.int32)
    told = {"name": name, "content": _content(stored)}
    try:
        with write_file_aside(path, shared=True) as partial:
            save_file(stored, partial, metadata=told)
    except (OSError, SafetensorError) as error:
        tell(f"tokens cannot be kept in {path.parent} ({error}); data.cache sets where")


def _content(stored: dict[str, NDArray[Any]]) -> str:
    digest = hashlib.sha256()
    for key in sorted(stored):
        digest.update(key.encode() + str(stored[key].shape).encode() + stored[key].tobytes())
    return digest.hexdigest()
