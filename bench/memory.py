"""Peak memory of what a process does: device memory on a GPU, resident memory on a CPU."""

from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """``with PeakMemory() as peak: ...``, then `peak.mb`: the highest memory inside, less what was in use before.

    Run it in a fresh process, since freed memory that the allocator kept would hide what comes after. On a CPU it reads
    the kernel's high-water mark of resident memory (Linux).
    """

    mb: float = 0.0  # allocated, in 10^6 bytes
    reserved_mb: float = 0.0  # on a GPU: held by the caching allocator

    def __enter__(self) -> "PeakMemory":
        self._cuda = torch.cuda.is_available()
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            CLEAR.write_text("5")  # the high-water mark begins anew
            self._before = _resident("VmRSS")
        return self

    def __exit__(self, *error: object) -> None:
        if self._cuda:
            torch.cuda.synchronize()
            self.mb = (torch.cuda.max_memory_allocated() - self._before) / 1e6
            self.reserved_mb = torch.cuda.max_memory_reserved() / 1e6
        else:
            self.mb = (_resident("VmHWM") - self._before) / 1e6


def _resident(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024
