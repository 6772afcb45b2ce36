"""Files and folders that are there whole or not at all, and folders that cannot be written.

A file or a folder is written aside, under a temporary name, and renamed when it is complete. A folder that it replaces
is moved aside first and removed last, so a kill at any moment leaves the old one or the new one: under its name, or,
between the two renames, under the name that `find_whole` knows.

Only what is ours is removed: a folder that we made or moved aside carries `MARK` until it has its name. Anything else
under such a name is somebody's, and refused by name. No link is followed to remove what it leads to.
"""

import errno
import glob
import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from apt.files.manifest import write_manifest
from apt.files.reading import read_rows

MARK = ".apt-lm"  # a file in each folder that this package may remove
FORGOTTEN = 24 * 3600  # seconds since its last byte after which nobody is writing a file any more
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG)
OF_RUST = re.compile(r"\(os error (\d+)\)")  # how safetensors and tokenizers tell it, in classes of their own
OF_TORCH = "inline_container.cc"  # of torch.save, which does not tell why


def check_writable(folder: Path, room: str, setting: str = "output_dir") -> None:
    """Raise OSError where a folder cannot be made, or nothing can be written in it; nothing is made here.

    Args:
        folder: what is to be written, whether it exists or not.
        room: begins the message.
        setting: that names the folder.
    """
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.exists(path))
    if nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK):
        return
    why = "may not be written" if nearest.is_dir() else "is no folder"
    raise OSError(f"{room}: {folder} cannot be written, as {nearest} {why}; give another {setting}")


@contextmanager
def writing(folder: Path, room: str, advice: str) -> Iterator[None]:
    """Errors of writing into a folder become an OSError of one line; all others pass.

    Args:
        folder: where everything inside writes.
        room: begins the message.
        advice: ends it.
    """
    try:
        yield
    except Exception as error:  # torch, safetensors and tokenizers have classes of their own; all others pass on
        reason = _reason(error, folder)
        if reason is None:
            raise
        raise OSError(f"{room}: {folder} cannot be written: {reason}; {advice}") from error


def _reason(error: BaseException | None, folder: Path) -> str | None:
    """Why writing failed, or None where this is another error."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL + REFUSED and _is_there(error, folder):
            return os.strerror(error.errno)
        code = OF_RUST.search(str(error))
        if code is not None and int(code[1]) in FULL + REFUSED:
            return os.strerror(int(code[1]))
        if OF_TORCH in str(error):
            return f"a file was cut off, {shutil.disk_usage(folder).free / 1e6:,.1f} MB are free there"
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


def _is_there(error: OSError, folder: Path) -> bool:
    """Whether the file of an error lies in the folder or around it. A disk that is full names no file."""
    if error.filename is None:
        return error.errno in FULL
    path = Path(os.fsdecode(error.filename)).absolute()
    folder = folder.absolute()
    return path == folder or folder in path.parents or path in folder.parents


def partial_of(path: Path) -> Path:
    """Where a file or a folder is written before it gets its name."""
    return path.with_name(path.name + ".partial")


def replaced_of(folder: Path) -> Path:
    """Where a folder waits while another takes its name."""
    return folder.with_name(folder.name + ".replaced")


def mark(folder: Path) -> None:
    """Make a folder, if it is not there, and say in it that it is ours to remove."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).write_text("apt-lm writes this folder, and removes or renames it.\n", encoding="utf-8")


def is_ours(path: Path) -> bool:
    """Whether a folder may be removed: it carries our mark, or nothing is lost with it."""
    if path.is_symlink() or not path.is_dir():
        return False
    return (path / MARK).is_file() or not any(path.iterdir())


def check_ours(*folders: Path) -> None:
    """Raise ValueError for the first that is there and not ours: it stays as it is."""
    for folder in folders:
        if os.path.lexists(folder) and not is_ours(folder):
            raise ValueError(
                f"{folder} is needed for what is not yet complete, but is not of apt-lm; it stays, move it away"
            )


def remove_ours(folder: Path) -> None:
    """Remove a folder of ours, where it is there and can be removed; ValueError where it is not ours."""
    check_ours(folder)
    if folder.exists():
        for path in folder.iterdir():
            if path.name != MARK:
                _remove(path)
        # The mark goes last: what a kill leaves of the folder is still ours.
        _remove(folder)


def discard(folder: Path) -> None:
    """Remove a folder inside one of ours: it loses its name first, so a kill leaves no half of it under that name."""
    aside = replaced_of(folder)
    _remove(aside)
    with suppress(FileNotFoundError):
        os.rename(folder, aside)
        _remove(aside)


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        with suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def write_file_aside(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Lend a temporary name to write a file under; the file gets its own where the block ends without an error.

    Args:
        path: the file; its folder is made.
        shared: other processes may write the same file meanwhile, so each has a temporary name of its own.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name that nobody else gives to a file.
    partial = path.with_name(f".{path.name}.{os.getpid()}.apt-lm" if shared else f".{path.name}.apt-lm")
    if shared:
        _remove_forgotten(path)
    partial.unlink(missing_ok=True)  # of a kill, or a link that leads elsewhere
    try:
        yield partial
        os.replace(partial, path)
    except Exception:
        with suppress(OSError):
            partial.unlink()
        raise


def _remove_forgotten(path: Path) -> None:
    """Remove what processes that were killed left of this file, on whichever machine: nobody writes so long."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.apt-lm"):
        with suppress(OSError):
            if time.time() - left.lstat().st_mtime > FORGOTTEN:
                left.unlink()


def check_replaceable(folder: Path, holds: str) -> None:
    """Raise ValueError where `write_folder_aside` would: before the work whose result is to be written."""
    if os.path.lexists(folder) and not (folder / holds).is_file() and not is_ours(folder):
        raise ValueError(f"{folder} exists and holds no {holds}; it stays as it is, give another folder")
    check_ours(partial_of(folder), replaced_of(folder))


@contextmanager
def write_folder_aside(folder: Path, holds: str) -> Iterator[Path]:
    """Lend an empty folder to write in; it takes the place of `folder` where the block ends without an error.

    The list of its files, by which a reader knows that it has all of them, is written last.

    Args:
        folder: that is written. One of that name is replaced where it is of the same kind.
        holds: a file that every folder of this kind has.

    Raises:
        ValueError: what has the name, or the temporary name, is not ours; it stays.
    """
    check_replaceable(folder, holds)
    partial = partial_of(folder)
    remove_ours(partial)
    partial.mkdir(parents=True)
    mark(partial)
    try:
        yield partial
        write_manifest(partial)
    except Exception:
        remove_ours(partial)
        raise
    publish_folder(partial, folder)


def publish_folder(written: Path, folder: Path) -> None:
    """Give a folder that is complete its name. One that has the name is moved aside first, and removed last.

    Raises:
        ValueError: what has the name that the older one gets meanwhile is not ours.
    """
    replaced = replaced_of(written.parent / folder.name)
    check_ours(replaced)
    is_link = folder.is_symlink()
    if is_link or folder.exists():
        remove_ours(replaced)
        if not is_link:  # what a link leads to is not ours
            mark(folder)
        os.rename(folder, replaced)
    os.rename(written, folder)
    (folder / MARK).unlink(missing_ok=True)
    if is_link:
        replaced.unlink()
    remove_ours(replaced)


def find_whole(folder: Path) -> Path:
    """Return the folder, or, where a kill fell between the two renames of `publish_folder`, the one moved aside."""
    if folder.exists() or not replaced_of(folder).exists():
        return folder
    replaced = replaced_of(folder)
    warnings.warn(
        f"{folder} is not there: the write that was to replace it was stopped, and what it was lies in {replaced}",
        stacklevel=3,
    )
    return replaced


def append_jsonl(path: Path, row: dict[str, Any]) -> None:
    """Add one line to a JSON-lines file; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read_jsonl(path: Path, room: str = "files") -> list[dict[str, Any]]:
    """Every row of a JSON-lines file, blank lines left out; ValueError names the file and the line."""
    return read_rows(path, room)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """Replace a JSON-lines file by these rows, as `write_text` does."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_json(path: Path, row: dict[str, Any]) -> None:
    """Replace a JSON file, as `write_text` does."""
    write_text(path, json.dumps(row, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace a text file: a reader sees the old one or the new one, never half of it."""
    with write_file_aside(path) as partial:
        partial.write_text(text, encoding="utf-8")
