"""The clock of the kernel benchmark: contestants interleaved in one loop, GPU time by events, host time beside it."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from bench.rows import quantiles
from bench.turns import TURNS

Call = Callable[[], object]
CYCLES_PER_MS = 2_000_000  # of a GPU at 2 GHz; a slower one waits longer, which does no harm


@dataclass
class Times:
    """Milliseconds of every run of one contestant.

    On the device; on the host to enqueue it; and by the clock on the wall, host and device together, where asked for.
    """

    device_ms: list[float] = field(default_factory=list)
    host_ms: list[float] = field(default_factory=list)
    wall_ms: list[float] = field(default_factory=list)

    def columns(self) -> dict[str, float | int]:
        p20, median, p80 = quantiles(self.device_ms)
        columns: dict[str, float | int] = {"median_ms": round(median, 5), "p20_ms": round(p20, 5)}
        columns["p80_ms"] = round(p80, 5)
        return columns | {"host_ms": round(quantiles(self.host_ms)[1], 5), "runs": len(self.device_ms)}

    @property
    def median(self) -> float:
        return quantiles(self.device_ms)[1]

    def over(self, other: "Times") -> float:
        """The median of the ratios turn by turn, on the device."""
        return _median_ratio(self.device_ms, other.device_ms)

    def wall_over(self, other: "Times") -> float:
        """The same by the clock on the wall."""
        return _median_ratio(self.wall_ms, other.wall_ms)


def _median_ratio(mine: list[float], theirs: list[float]) -> float:
    return round(quantiles([a / b for a, b in zip(mine, theirs, strict=True)])[1], 4)


@dataclass(frozen=True)
class Clock:
    """How often and how long a case is timed."""

    device: torch.device
    runs: int = 50  # timed runs of each contestant
    seconds: float = 8.0  # a case that takes longer stops early, after at least 5 runs
    warmup: int = 3
    wall: bool = False  # also time each run as a user sees it, from a device that is idle to one that is idle again

    def interleaved(self, contestants: dict[str, list[Call]]) -> dict[str, Times]:
        """Time each contestant; its calls are the same work on other copies of the inputs, taken in turn."""
        pauses = {name: self._warm_up(calls) for name, calls in contestants.items()}
        times = {name: Times() for name in contestants}
        stop = time.perf_counter() + self.seconds
        for run in range(self.runs):
            if run >= 5 and time.perf_counter() > stop:
                break
            TURNS.change()
            order = list(contestants) if run % 2 else list(reversed(contestants))
            pending = [
                (name, self._once(contestants[name][run % len(contestants[name])], pauses[name])) for name in order
            ]
            self._synchronise()
            for name, (read, host_ms) in pending:
                times[name].device_ms.append(read())
                times[name].host_ms.append(host_ms)
            for name in order if self.wall else ():
                times[name].wall_ms.append(self._on_the_wall(contestants[name][run % len(contestants[name])]))
        return times

    def _on_the_wall(self, call: Call) -> float:
        self._synchronise()
        started = time.perf_counter()
        call()
        self._synchronise()
        return (time.perf_counter() - started) * 1e3

    def _warm_up(self, calls: list[Call]) -> float:
        """The longest time in ms that the host took for one call, after the first of each."""
        longest = 0.0
        for run in range(len(calls) + self.warmup):
            started = time.perf_counter()
            calls[run % len(calls)]()
            if run >= len(calls):
                longest = max(longest, (time.perf_counter() - started) * 1e3)
            self._synchronise()
        return longest

    def _once(self, call: Call, pause_ms: float) -> tuple[Callable[[], float], float]:
        if self.device.type != "cuda":
            started = time.perf_counter()
            call()
            ms = (time.perf_counter() - started) * 1e3
            return (lambda: ms), ms
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # The device waits while the host enqueues, so that gaps between launches are not counted as device time.
        torch.cuda._sleep(int(min(1.5 * pause_ms + 0.05, 20.0) * CYCLES_PER_MS))
        begin.record()
        started = time.perf_counter()
        call()
        host_ms = (time.perf_counter() - started) * 1e3
        end.record()
        return (lambda: begin.elapsed_time(end)), host_ms

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def as_graph(call: Call) -> Call:
    """The call as a replayed CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay
