"""The one door for files that are read: regular files of a bounded size, and refusals of one line that name the file.

What a file says may be wrong in any way: cut, altered, made to hang or to fill the memory. Nothing here runs code of a
file, follows it into a device or a pipe, or lets it say more than its reader can hold.
"""

import hashlib
import json
import math
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from torch import Tensor

MOST_TEXT = 64 << 20  # bytes of a JSON or YAML file of ours; the largest, a checkpoint's state, takes a few MB
MOST_NODES = 1_000_000  # values of a YAML document with its aliases written out
CONTENT = "content_sha256"  # in the metadata of a safetensors file that stands alone, of all its tensors
SHOWN = 60  # characters of a value in a message


class UnreadableError(ValueError):
    """A file is not what it must be; the message names it."""


class _Loader(yaml.SafeLoader):
    """Plain values only; a key that stands twice is refused, and so is what aliases would blow up."""

    def get_single_node(self) -> Any:
        node: Any = super().get_single_node()
        _count(node, {}, set())
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key, _ in node.value:
            # What `<<` brings in may be said otherwise here.
            if key.tag == "tag:yaml.org,2002:merge" or not isinstance(key, yaml.ScalarNode):
                continue
            if (key.tag, key.value) in seen:
                line = key.start_mark.line + 1
                raise yaml.YAMLError(f"the key {key.value[:SHOWN]!r} stands there twice, again on line {line}")
            seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep=deep)


def _count(node: Any, known: dict[int, int], above: set[int]) -> int:
    """How many values a node has with its aliases written out; YAMLError where there are too many, or no end."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) in above:
        raise yaml.YAMLError("an alias leads to what it stands in")
    if id(node) not in known:
        above.add(id(node))
        inner = [part for entry in node.value for part in (entry if isinstance(entry, tuple) else (entry,))]
        known[id(node)] = 1 + sum(_count(part, known, above) for part in inner)
        above.discard(id(node))
        if known[id(node)] > MOST_NODES:
            raise yaml.YAMLError(f"its aliases stand for more than {MOST_NODES:,} values")
    return known[id(node)]


def parse_yaml(text: str) -> Any:
    """The value of a YAML document.

    Raises:
        yaml.YAMLError: it is no YAML, a key stands twice, or it is nested or aliased beyond all use.
    """
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    except (ValueError, TypeError, OverflowError) as error:  # of a date or a number, a key that is a list
        raise yaml.YAMLError(str(error)) from None


def read_text(path: Path, room: str, most: int = MOST_TEXT) -> str:
    """The text of a file.

    Args:
        path: of a regular file.
        room: begins a message.
        most: bytes that it may have.

    Raises:
        FileNotFoundError: there is no such file.
        UnreadableError: it is no regular file, too large, or not UTF-8.
    """
    check_regular(path, room)
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise UnreadableError(f"{room}: {path} has more than {most:,} bytes, so it is no file of this kind")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UnreadableError(f"{room}: {path} is corrupt (byte {error.start} is not UTF-8)") from None


def check_regular(path: Path, room: str) -> None:
    """Raise FileNotFoundError where there is nothing, UnreadableError for what is no regular file: a pipe, a device."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise FileNotFoundError(f"{room}: there is no file {path}") from None
    if not stat.S_ISREG(mode):
        raise UnreadableError(f"{room}: {path} is no regular file, and is not read")


def check_folder(folder: Path, room: str) -> None:
    """Refuse a folder that another library is to read where a file in it is a pipe or a device, which may never end."""
    for path in folder.iterdir():
        if not path.is_dir() and path.exists():
            check_regular(path, room)


def read_json(path: Path, room: str) -> Any:
    """The value of a JSON file. Raises as `read_text` does, and `UnreadableError` where it is no JSON."""
    return parse_json(read_text(path, room), f"{room}: {path}")


def parse_json(text: str, place: str) -> Any:
    """The value of a JSON text; `UnreadableError` begins with its place."""
    try:
        return json.loads(text)
    except RecursionError:
        raise UnreadableError(f"{place} is corrupt (nested too deeply)") from None
    except ValueError as error:  # a number of thousands of digits too
        raise UnreadableError(f"{place} is corrupt ({error})") from None


def read_json_table(path: Path, room: str) -> dict[str, Any]:
    """A JSON file that holds names and values."""
    found = read_json(path, room)
    if not isinstance(found, dict):
        raise UnreadableError(f"{room}: {path} is corrupt (it holds no names and values, but {shown(found)})")
    return found


def read_rows(path: Path, room: str) -> list[dict[str, Any]]:
    """Every row of a JSON-lines file, blank lines left out."""
    rows = []
    for number, line in enumerate(read_text(path, room).splitlines(), 1):
        if line.strip():
            row = parse_json(line, f"{room}: {path}, line {number}")
            if not isinstance(row, dict):
                raise UnreadableError(f"{room}: {path}, line {number} is corrupt (no names and values)")
            rows.append(row)
    return rows


def read_yaml(path: Path, room: str) -> Any:
    """The value of a YAML file. Raises as `read_text` does, and `UnreadableError` where it is no YAML."""
    text = read_text(path, room)
    try:
        return parse_yaml(text)
    except yaml.YAMLError as error:
        raise UnreadableError(f"{room}: {path} is not YAML: {' '.join(str(error).split())}") from None


def read_tensors(path: Path, room: str) -> tuple[dict[str, "Tensor"], dict[str, str]]:
    """The tensors of a safetensors file by name, and its metadata.

    Raises:
        FileNotFoundError: there is no such file.
        UnreadableError: it is no safetensors file, or cut; files that would have to be unpickled are not read.
    """
    from safetensors import SafetensorError, safe_open

    check_regular(path, room)
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, LookupError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnreadableError(f"{room}: {path} is corrupt, or no safetensors file ({reason})") from None


def check_numbers(tensors: Mapping[str, "Tensor"], place: str) -> None:
    """Raise UnreadableError for the first tensor that holds a NaN or an infinity; the message begins with its place."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.float().isfinite().all():
            raise UnreadableError(f"{place} is corrupt ({name} holds a NaN or an infinity)")


def content_of(tensors: Mapping[str, "Tensor"]) -> str:
    """The checksum of tensors, their names, shapes and types included."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def is_finite_number(value: Any) -> bool:
    """Whether a value is a number, and no NaN, infinity or truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def shown(value: Any) -> str:
    """A value in a message: its beginning, however much there is of it."""
    return _short(value, SHOWN)


def _short(value: Any, room: int) -> str:
    """As `repr`, but no more of a value is written out than is shown: aliases may make it endless."""
    if isinstance(value, dict | list | tuple) and value:
        parts = []
        left = room
        for key in value:
            inner = f"{_short(key, left)}: {_short(value[key], left)}" if isinstance(value, dict) else _short(key, left)
            parts.append(inner)
            left -= len(inner) + 2
            if left <= 0:
                break
        brackets = {dict: "{}", list: "[]"}.get(type(value), "()")
        text = brackets[0] + ", ".join(parts) + brackets[1]
    elif isinstance(value, str):
        text = repr(value[: room + 1])
    elif isinstance(value, int) and abs(value) > 10**room:
        text = f"a number of more than {room} digits"
    else:
        text = repr(value)
    return text if len(text) <= room else text[: max(0, room - 3)] + "..."
