"""The list of files of a folder with sizes and checksums: written last, so it tells a whole folder, and checked."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from apt.files.reading import UnreadableError, read_json_table, shown

MANIFEST = "apt_files.json"
FORMAT = 1
FREE = ("README.md", ".apt-lm")  # nothing is loaded from them; the second goes when the folder gets its name
CHUNK = 1 << 20


def write_manifest(folder: Path) -> None:
    """List every file below a folder. Call it when all of them are written."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (MANIFEST, *FREE))
    files = {path.relative_to(folder).as_posix(): _entry(path) for path in paths}
    text = json.dumps({"format": FORMAT, "files": files}, indent=2)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def _entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def check_manifest(folder: Path, room: str, checked: Iterable[str] = ()) -> bool:
    """Whether a folder has a list of its files; each file is then the one that was written.

    Files that the list does not name may be added. A folder of an older version has no list.

    Args:
        folder: as it was written.
        room: begins a message.
        checked: files whose checksum is compared elsewhere; here their size is.

    Raises:
        UnreadableError: a file is missing, or another than was written; it is named.
    """
    if not (folder / MANIFEST).exists():
        return False
    told = read_json_table(folder / MANIFEST, room)
    files = told.get("files")
    if told.get("format") != FORMAT or not isinstance(files, dict):
        raise UnreadableError(
            f"{room}: {folder / MANIFEST} is corrupt (no list of files); copy or write the folder again"
        )
    for name, entry in files.items():
        _check_file(folder, name, entry, room, by_sum=name not in set(checked))
    return True


def _check_file(folder: Path, name: str, entry: Any, room: str, *, by_sum: bool) -> None:
    path = folder / name
    if not isinstance(entry, dict) or Path(name).is_absolute() or ".." in Path(name).parts:
        raise UnreadableError(
            f"{room}: {folder / MANIFEST} is corrupt (its entry {shown(name)}); copy or write it again"
        )
    advice = f"copy or write it again; where you changed it on purpose, remove {MANIFEST}"
    if not path.is_file():
        raise UnreadableError(f"{room}: {path} is missing; {advice}")
    size = path.stat().st_size
    if size != entry.get("bytes"):
        raise UnreadableError(
            f"{room}: {path} has {size} of {shown(entry.get('bytes'))} bytes; it is truncated or another, {advice}"
        )
    if by_sum and sha256_of(path) != entry.get("sha256"):
        raise UnreadableError(f"{room}: {path} is corrupt (its checksum differs); {advice}")


def sha256_of(path: Path) -> str:
    """The checksum of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
