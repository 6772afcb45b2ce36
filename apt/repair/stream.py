"""The drift of the stream that a cut leaves, given back bottom up: each projection in turn takes what it can of it.

A layer of a pre-norm model adds what its output and down projections give to a stream. With S the stream of the model
as it is cut, D that of the model as it was, both behind a projection, and x what it reads now, the projection gets the
ridge regression of ``D - S`` on x. So it answers for what the layers below have lost too, not for its own units alone
(the residual of the stream, after Kwon et al., arXiv 2204.09656, and K-prune, arXiv 2308.03449, in one sweep).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from apt.layers import APTAdapter
from apt.layers.passes import Passes
from apt.process.progress import progress
from apt.pruning.units import UnitGroup
from apt.repair.calls import LayerCall, Recorded
from apt.repair.moments import is_held_out
from apt.repair.residual import Residual, solve_residual
from apt.repair.solve import Solution

PLAIN = 1e-2  # of what a layer adds to the stream, at most, may be no sum of its projections


class _ReachedError(Exception):
    """A projection has been given its input: what comes behind it is not asked for."""


@dataclass(frozen=True)
class CutLayer:
    """A layer whose units were chosen, with its projections as they were and as they are.

    Args:
        module: of the layer.
        groups: its unit groups, by their readers.
        kept: columns that stay, by reader.
        as_it_was: a context in which masks are open and weights those of before the cut.
        change: writes a solution into a reader, for the columns that stay.
    """

    module: nn.Module
    groups: Mapping[APTAdapter, UnitGroup]
    kept: Mapping[APTAdapter, Tensor]
    as_it_was: Callable[[], Any]
    change: Callable[[UnitGroup, Tensor, Solution], None]


class Sweep:
    """Goes through the layers of a stack once, and corrects what reads their units.

    Args:
        passes: of the model.
        counted: batches in all, of which some are held out.
    """

    def __init__(self, passes: Passes | None, counted: int) -> None:
        self.passes = passes
        self.counted = counted

    @torch.no_grad()
    def run(self, layers: Sequence[CutLayer], dense: Recorded, cut: Recorded) -> dict[str, float]:
        """Correct the layers in their order.

        Args:
            layers: of the stack.
            dense: streams and calls of the model as it was.
            cut: of the model as it is cut.

        Returns:
            What is left of the drift behind each projection that was changed, by unit group: the share of its mean
            square, on tokens held out.

        Raises:
            FloatingPointError: the stream holds a number that is NaN or infinite.
        """
        found: dict[str, float] = {}
        if not self._any_sum(layers, dense):
            return found
        before, now = list(dense.streams), list(cut.streams)
        for index, layer in enumerate(progress(layers, "streams", total=len(layers))):
            with layer.as_it_was():
                before, sums, order = self._dense(layer, dense.calls[index], before)
            calls = cut.calls[index]
            added: list[Tensor] = []
            for place, reader in enumerate(order):
                added = self._correct(layer, reader, calls, now, [each[place] for each in sums], found)
            if order:
                now = added
            else:
                now = [call.again(layer.module, stream, self.passes) for call, stream in zip(calls, now, strict=True)]
        return found

    def _any_sum(self, layers: Sequence[CutLayer], dense: Recorded) -> bool:
        """Whether any layer is a sum, by the first batch."""
        streams = dense.streams[:1]
        for layer, calls in zip(layers, dense.calls, strict=True):
            with layer.as_it_was():
                streams, _, order = self._dense(layer, calls[:1], streams)
            if order:
                return True
        return False

    def _dense(
        self, layer: CutLayer, calls: Sequence[LayerCall], streams: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[list[Tensor]], list[APTAdapter]]:
        """The streams behind a layer as it was, and behind each of its projections, in the order these come.

        No projection is named where the layer is no sum of the stream and of what they give.
        """
        behind, sums = [], []
        order: list[APTAdapter] = []
        for call, stream in zip(calls, streams, strict=True):
            with _listening(layer.groups) as heard:
                answer = call.again(layer.module, stream, self.passes)
            order = [reader for reader, _ in heard]
            total, steps = stream, []
            for _, given in heard:
                total = total + given.view_as(total)
                steps.append(total)
            behind.append(answer)
            sums.append(steps)
            off, whole = (total - answer).norm(), (answer - stream).norm()
            if not bool(off <= PLAIN * whole):
                order = []
                break
        if not order:
            rest = list(zip(calls, streams, strict=True))[len(behind) :]
            behind += [call.again(layer.module, stream, self.passes) for call, stream in rest]
        return behind, sums, order

    def _correct(
        self,
        layer: CutLayer,
        reader: APTAdapter,
        calls: Sequence[LayerCall],
        streams: Sequence[Tensor],
        wanted: Sequence[Tensor],
        found: dict[str, float],
    ) -> list[Tensor]:
        """Fit a projection to the streams wanted behind it, and write it; the streams that come behind it then."""
        group, kept = layer.groups[reader], layer.kept[reader]
        parts = [Residual.zeros(len(kept), reader.n_out, reader.weight.device, reader.weight.dtype) for _ in range(2)]
        inputs, came = [], []
        for number, (call, stream, goal) in enumerate(zip(calls, streams, wanted, strict=True)):
            x, here = self._until(layer, reader, call, stream)
            inputs.append(x)
            came.append(here)
            residual = (goal - here).reshape(-1, reader.n_out) - self._given(call, reader, x)
            x_TS = x.reshape(-1, reader.n_in)[:, kept]
            if call.valid is not None:
                real = call.valid.reshape(-1).bool()
                x_TS, residual = x_TS[real], residual[real]
            parts[is_held_out(number, self.counted)].add(x_TS, residual)
        held_out = parts[1] if float(parts[1].inputs.count) else None
        try:
            solution = solve_residual(parts[0], held_out, with_bias=reader.bias is not None)
        except FloatingPointError as error:
            raise FloatingPointError(f"repair: of {group.name} {error}; look at the calibration batches") from None
        if solution.ridge is not None:
            layer.change(group, kept, solution)
            found[group.name] = solution.after / solution.before
        triples = zip(calls, came, inputs, strict=True)
        return [here + self._given(call, reader, x).view_as(here) for call, here, x in triples]

    def _given(self, call: LayerCall, reader: APTAdapter, x: Tensor) -> Tensor:
        """What a projection makes of its input in the pass of a call, ``[B T, O]``."""
        answer: Tensor = call.inside(self.passes, reader, x)
        return answer.reshape(-1, reader.n_out)

    def _until(self, layer: CutLayer, reader: APTAdapter, call: LayerCall, stream: Tensor) -> tuple[Tensor, Tensor]:
        """What a projection reads as the layer is cut, and the stream that it adds to."""
        seen: list[Tensor] = []

        def stop(module: nn.Module, args: tuple[Any, ...]) -> None:
            seen.append(args[0])
            raise _ReachedError

        handle = reader.register_forward_pre_hook(stop)
        try:
            with _listening(layer.groups) as heard:
                call.again(layer.module, stream, self.passes)
        except _ReachedError:
            pass
        finally:
            handle.remove()
        here = stream
        for _, given in heard:
            here = here + given.view_as(here)
        return seen[0], here


@contextmanager
def _listening(readers: Mapping[APTAdapter, Any]) -> Iterator[list[tuple[APTAdapter, Tensor]]]:
    """What these projections give inside, in the order of their calls."""
    heard: list[tuple[APTAdapter, Tensor]] = []

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        assert isinstance(module, APTAdapter)
        heard.append((module, output))

    with ExitStack() as stack:
        for reader in readers:
            stack.callback(reader.register_forward_hook(hook).remove)
        yield heard
