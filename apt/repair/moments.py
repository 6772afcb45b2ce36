"""Second moments of what the output and down projections read, collected while batches pass."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from apt.layers import APTAdapter
from apt.layers.passes import ValidTokens
from apt.repair.solve import Moment

HELD_OUT = 8  # every so many a batch is held out, to choose the ridge by; of fewer than that the last


class Collector:
    """Forward pre-hook of a projection: adds the tokens that are there to one of its two moments.

    Args:
        linear: the projection; its unit mask knows which tokens are padding.
    """

    def __init__(self, linear: APTAdapter) -> None:
        assert linear.unit_mask is not None
        self.valid: ValidTokens = linear.unit_mask.valid
        weight = linear.weight
        self.moments = [Moment.zeros(linear.n_in, weight.device, weight.dtype) for _ in range(2)]
        self.part = 0  # 0 is fitted on, 1 is held out

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        x: Tensor = args[0].detach()
        valid = self.valid.of(x)
        x_TD = x.reshape(-1, x.shape[-1])
        if valid is not None:
            x_TD = x_TD[valid.reshape(-1).bool()]
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            self.moments[self.part].add(x_TD)

    @property
    def fit(self) -> Moment:
        return self.moments[0]

    @property
    def whole(self) -> Moment:
        """The moment of all tokens, held out or not."""
        return self.moments[0].plus(self.moments[1])

    def to(self, device: torch.device | str) -> None:
        """Move what was collected."""
        self.moments = [moment.to(device) for moment in self.moments]

    @property
    def held_out(self) -> Moment | None:
        """None where no token was held out."""
        return self.moments[1] if float(self.moments[1].count) else None


@contextmanager
def collecting(linears: Sequence[APTAdapter]) -> Iterator[list[Collector]]:
    """Collect the moments of these projections from every pass inside."""
    collectors = [Collector(linear) for linear in linears]
    with ExitStack() as stack:
        for linear, collector in zip(linears, collectors, strict=True):
            stack.callback(linear.register_forward_pre_hook(collector).remove)
        yield collectors


def hold_out(collectors: Sequence[Collector], number: int, count: int) -> None:
    """Say which of so many batches comes next, from 0: every eighth is held out, of fewer the last; none of one."""
    for collector in collectors:
        collector.part = int(is_held_out(number, count))


def is_held_out(number: int, count: int) -> bool:
    """Whether of so many batches this one, from 0, is to choose by."""
    every = min(HELD_OUT, count)
    return every > 1 and number % every == every - 1


def bytes_of(linear: APTAdapter) -> int:
    """Memory of the moments of a projection."""
    size = torch.promote_types(linear.weight.dtype, torch.float32).itemsize
    return 2 * size * linear.n_in**2
