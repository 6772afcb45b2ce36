"""Folders that cannot be written: one line that names the folder, says why and what to do."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG)
OF_RUST = re.compile(r"\(os error (\d+)\)")  # how safetensors and tokenizers tell it, in classes of their own
OF_TORCH = "inline_container.cc"  # of torch.save, which does not tell why


def check_writable(folder: Path, room: str) -> None:
    """Raise OSError where a folder cannot be made, or nothing can be written in it; nothing is made here.

    Args:
        folder: what is to be written, whether it exists or not.
        room: begins the message.
    """
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.exists(path))
    if nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK):
        return
    why = "may not be written" if nearest.is_dir() else "is no folder"
    raise OSError(f"{room}: {folder} cannot be written, as {nearest} {why}; give another output_dir")


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
    path, folder = Path(os.fsdecode(error.filename)).absolute(), folder.absolute()
    return path == folder or folder in path.parents or path in folder.parents
