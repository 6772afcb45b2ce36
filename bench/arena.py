"""Where contestants for a training step are measured: one shape on this device, in turns with two rivals."""

import copy
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench.contestants import Contestant
from bench.forced import find, forcing
from bench.memory import PeakMemory
from bench.rows import environment, quantiles
from bench.shapes import SHAPES
from bench.timing import Clock, Times

REFERENCE, LIMIT = "peft lora", "frozen"
CLOSE = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # of the largest logit
SECONDS = 60.0
EXACT = ("full", "peft lora", "apt lora", "apt 0%")  # start as the plain model


class Arena:
    """A shape on this device, and whom each contestant takes turns with: PEFT's LoRA, and the frozen model."""

    def __init__(self, shape: str, dtype: torch.dtype, layers: int | None) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.name, self.shape, self.dtype, self.layers = shape, SHAPES[shape], dtype, layers
        self.plain = self.shape.model(layers, self.device).to(dtype)
        self.batch = self.shape.inputs(self.plain, self.device)

    def enter(self, name: str) -> Contestant:
        """A contestant on a model of its own."""
        return find(name)(copy.deepcopy(self.plain), self.batch, self.shape.targets)

    @functools.cached_property
    def rivals(self) -> dict[str, Contestant]:
        return {name: self.enter(name) for name in (REFERENCE, LIMIT)}

    def measure(self, name: str, runs: int, seconds: float = SECONDS) -> dict[str, Any]:
        """The row of one contestant, here and now, from so many turns, or what `seconds` allow."""
        with PeakMemory() as peak:
            mine = self.enter(name)
            if name.startswith(EXACT):
                _compare(name, self.plain, mine, self.batch, CLOSE[self.dtype])
            for _ in range(3):
                mine.step()
        entered = {name: mine} | {key: rival for key, rival in self.rivals.items() if key != name}
        clock = Clock(torch.device(self.device), runs=runs, seconds=seconds, wall=self.device == "cuda")
        times = clock.interleaved({key: [contestant.step] for key, contestant in entered.items()})
        row: dict[str, Any] = {"what": "train_step", "shape": self.name, "contestant": name}
        row |= self._sizes() | self._times(times, name)
        row |= {"peak_mb": round(peak.mb, 1), "reserved_mb": round(peak.reserved_mb, 1), "gflop": _gflop(mine)}
        return row | environment()

    def _sizes(self) -> dict[str, Any]:
        shape = self.shape
        sizes = {"dtype": str(self.dtype)[6:], "layers": self.layers or shape.layers, "of_layers": shape.of}
        params = sum(p.numel() for p in self.plain.parameters())
        return sizes | {"batch": shape.batch, "tokens": shape.tokens, "params": params}

    def _times(self, times: dict[str, Times], name: str) -> dict[str, Any]:
        """Time on the device and, on a GPU, by the clock on the wall, which counts the host too."""
        own, theirs, limit = (times[key] for key in (name, REFERENCE, LIMIT))
        p20, p50, p80 = (round(value, 3) for value in quantiles(own.device_ms))
        row: dict[str, Any] = {"ms_p20": p20, "ms_p50": p50, "ms_p80": p80, "runs": len(own.device_ms)}
        row |= {"over_peft": own.over(theirs), "over_limit": own.over(limit)}
        seen = p50
        if own.wall_ms:
            low, seen, high = (round(value, 3) for value in quantiles(own.wall_ms))
            row |= {"wall_ms_p20": low, "wall_ms_p50": seen, "wall_ms_p80": high}
            row |= {"wall_over_peft": own.wall_over(theirs), "host_ms": round(quantiles(own.host_ms)[1], 3)}
        return row | {"tokens_per_s": round(1e3 * self.shape.batch * self.shape.tokens / seen, 1)}


def measure(
    shape: str, name: str, runs: int, dtype: torch.dtype, layers: int | None, seconds: float = SECONDS
) -> dict[str, Any]:
    """The row of one contestant of a shape; see `Arena`."""
    return Arena(shape, dtype, layers).measure(name, runs, seconds)


def _compare(name: str, plain: nn.Module, mine: Contestant, batch: Mapping[str, Tensor], close: float) -> None:
    training = mine.model.training
    with torch.no_grad(), forcing(mine.backend):  # labels too: an encoder-decoder makes its decoder's input of them
        theirs = plain.eval()(**batch).logits
        apart = (mine.model.eval()(**batch).logits - theirs).abs().max().item()
        mine.model.train(training)
    if apart > close * max(1.0, theirs.abs().max().item()):
        raise RuntimeError(f"{name} differs from the plain model by {apart:.1e}, so its time means nothing")


def _gflop(contestant: Contestant) -> float:
    """GFLOP of one step, matrix products only; 0 where kernels or a compiler hide them."""
    if contestant.compiled:  # counting would compile it once more
        return 0.0
    with FlopCounterMode(display=False) as counter:
        contestant.step()
    return round(counter.get_total_flops() / 1e9, 3)
