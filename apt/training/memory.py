"""Memory of this process: of the GPU where the model is on one, else resident memory. How much, and giving it back."""

import ctypes
import os
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")  # Linux; its marks begin anew with the program, those of getrusage do not
# Of the C library of this process: glibc has it, others give memory back by themselves.
TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None


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
