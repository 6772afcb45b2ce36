"""Memory of this process: of the GPU where the model is on one, else resident memory. How much, and giving it back."""

import ctypes
import os
from pathlib import Path

import torch
from torch import nn

STATUS = Path("/proc/self/status")  # Linux; its marks begin anew with the program, those of getrusage do not
# Of the C library of this process: glibc has it, others give memory back by themselves.
TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
CAPACITY = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "DNNL_PRIMITIVE_CACHE_CAPACITY")  # oneDNN's names of one variable


def memory_mb(device: torch.device) -> tuple[float, float] | None:
    """Memory now and its peak, in 10^6 bytes; None where the system does not tell.

    On a GPU "now" is the peak since the last call (torch's statistics begin anew), as what is live between two steps
    says little; on a CPU it is what is resident, and the peak is that of the process so far.
    """
    if device.type == "cuda":
        now = torch.cuda.max_memory_allocated(device) / 1e6
        torch.cuda.reset_peak_memory_stats(device)
        return now, now
    if not STATUS.exists():
        return None
    fields = dict(line.split(":", 1) for line in STATUS.read_text(encoding="utf-8").splitlines() if ":" in line)
    now, peak = (int(fields[name].split()[0]) * 1024 / 1e6 for name in ("VmRSS", "VmHWM"))
    return now, peak


def give_back(device: torch.device) -> None:
    """Let the system have the memory that is free here and that the allocator keeps in the sizes of before.

    After an event no block has the size of one before it: on a GPU torch's cache would hold the old ones beside the
    new, on a CPU glibc keeps every page that was ever touched. It takes some hundredths of a second.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif TRIM is not None:
        TRIM(0)


def keep_few_kernels(model: nn.Module) -> None:
    """Let oneDNN keep 64 of the kernels that it compiles, instead of 1,024, where a float32 model is on a CPU.

    There it compiles GELU, forward and backward, for every size: for each length of a batch and, once layers are
    pruned, each width. What it keeps for them are small blocks among the activations, around which glibc's heap cannot
    close again. To compile one takes a tenth of a millisecond. In 16 bits oneDNN computes the matrix products too,
    whose kernels take longer: there all stay.

    oneDNN reads the variable when it compiles its first kernel, so call this before the model runs. A value that the
    user has set stays.
    """
    first = next(model.parameters(), None)
    here = first is not None and first.device.type == "cpu" and first.dtype is torch.float32
    if here and not any(name in os.environ for name in CAPACITY):
        os.environ[CAPACITY[0]] = "64"
