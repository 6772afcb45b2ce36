"""The largest singular triplets of a weight, computed once and kept on disk under the hash of the weight."""

import hashlib
import os
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from apt.files.reading import CONTENT, UnreadableError, content_of, read_tensors
from apt.files.telling import tell
from apt.files.whole import write_file_aside

CACHED_FROM = 2**16  # entries of a weight; smaller ones are decomposed sooner than read
FAR_BELOW = 16  # the randomised decomposition pays where so many times k is still below min(O, I)
ROUNDS = 8  # subspace iterations of it; the error falls with the (2 ROUNDS + 1)-th power of a singular value's share
VERSION = 1  # of the numbers; a higher one makes old files unread


def singular_triplets(weight: Tensor, count: int, cache: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """U ``[O, k]``, S ``[k]`` descending and V^T ``[k, I]``, in at least float32, on the weight's device.

    Args:
        weight: ``[O, I]``.
        count: k, at most ``min(O, I)``.
        cache: folder for the result; "auto" is ``apt-lm/svd`` in the user's cache folder; None keeps nothing.
    """
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    path = None
    if cache is not None and weight.numel() >= CACHED_FROM:
        path = _folder(cache) / f"{_digest(weight, count)}.safetensors"
    found = None if path is None else _read(path)
    if found is None:
        found = _decompose(wide, count)
        if path is not None:
            _write(path, found)
    u, s, vh = (tensor.to(device=wide.device, dtype=wide.dtype).contiguous() for tensor in found)
    return u, s, vh


def _decompose(weight: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    if FAR_BELOW * count >= min(weight.shape):
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        return u[:, :count], s[:count], vh[:count]
    devices = [weight.device] if weight.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):  # the same numbers every time, and no other random number moves
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(weight, q=min(2 * count + 8, *weight.shape), niter=ROUNDS)
    return u[:, :count], s[:count], v[:, :count].T


def _folder(cache: str) -> Path:
    if cache != "auto":
        return Path(cache)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "apt-lm" / "svd"


def _digest(weight: Tensor, count: int) -> str:
    """The hash of the numbers, their type, the shape, k and how it is computed."""
    digest = hashlib.sha256(f"{VERSION} {count} {weight.dtype} {list(weight.shape)} ".encode())
    digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read(path: Path) -> tuple[Tensor, Tensor, Tensor] | None:
    """The triplets in a file; None where there is none, or it is not what was written, and so is written anew."""
    if not path.is_file():
        return None
    try:
        stored, told = read_tensors(path, "svd_cache")
    except (OSError, UnreadableError) as error:
        _tell(path, error)
        return None
    if told.get("name") != path.stem or told.get(CONTENT) != content_of(stored):
        _tell(path, "its content is not what was written")
        return None
    return stored["U"], stored["S"], stored["Vh"]


def _tell(path: Path, why: object) -> None:
    tell(f"the decomposition kept in {path} is read no more ({why}); it is made again")


def _write(path: Path, found: tuple[Tensor, Tensor, Tensor]) -> None:
    """Keep the triplets; where that fails a warning says so, and the next run computes them again."""
    tensors = {name: tensor.cpu().contiguous() for name, tensor in zip(("U", "S", "Vh"), found, strict=True)}
    try:
        with write_file_aside(path, shared=True) as partial:
            save_file(tensors, partial, metadata={"name": path.stem, CONTENT: content_of(tensors)})
    except (OSError, SafetensorError) as error:
        warnings.warn(f"svd_cache: nothing is kept in {path.parent}: {error}", stacklevel=2)
