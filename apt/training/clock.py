"""One clock for everything that is timed while a model runs on its own device."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch

from apt.process.progress import progress

WARM_UPS = 3  # passes before the clock runs: allocations and thread pools settle


def medians_ms(
    runs: Mapping[str, Callable[[], object]], repeats: int, device: torch.device, what: str = "timing"
) -> dict[str, float]:
    """Median time of each run in ms, taken in turns, so that a drifting machine touches all alike.

    Args:
        runs: by name.
        repeats: timed calls of each.
        device: that they keep busy.
        what: is timed, for the line that tells progress.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in progress(range(WARM_UPS + repeats), what, "turn"):
        for name, run in runs.items():
            wait_for(device)
            started = time.perf_counter()
            run()
            wait_for(device)
            if repeat >= WARM_UPS:
                times[name].append(1000.0 * (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in times.items()}


def wait_for(device: torch.device) -> None:
    """Wait until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class StepClock:
    """Tokens and seconds of the optimizer steps of this process, by their number in the run; events lie between."""

    def __init__(self) -> None:
        self.tokens = 0
        self.last = 0  # number of the latest step
        self._rows: dict[int, tuple[int, float]] = {}
        self._started = 0.0
        self._logged = 0  # the latest step that a log has told of

    def begin(self) -> None:
        self.tokens = 0
        self._started = time.perf_counter()

    def end(self, step: int) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._rows[step] = self.tokens, time.perf_counter() - self._started
        self.last = step

    def since_log(self) -> tuple[int, float, int]:
        """Tokens, seconds and number of the steps since this was last asked."""
        rows = [row for step, row in self._rows.items() if step > self._logged]
        self._logged = self.last
        return sum(tokens for tokens, _ in rows), sum(seconds for _, seconds in rows), len(rows)

    def rate(self, first: int, last: int) -> float | None:
        """Tokens per second over the steps after `first` up to `last`; None where this process did none of them."""
        rows = [row for step, row in self._rows.items() if first < step <= last]
        if not rows:
            return None
        return sum(tokens for tokens, _ in rows) / sum(seconds for _, seconds in rows)
