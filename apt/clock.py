"""One clock for everything that is timed while a model runs on its own device."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch

WARM_UPS = 3  # passes before the clock runs: allocations and thread pools settle


def medians_ms(runs: Mapping[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, float]:
    """Median time of each run in ms, taken in turns, so that a drifting machine touches all alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(WARM_UPS + repeats):
        for name, run in runs.items():
            wait_for(device)
            started = time.perf_counter()
            run()
            wait_for(device)
            if repeat >= WARM_UPS:
                times[name].append(1000.0 * (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in times.items()}


def wait_for(device: torch.device) -> None:
    """Until the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
