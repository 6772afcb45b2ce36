"""The projections of one model that read its units: their weights as they were, their moments, and their repair."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from apt.layers import APTAdapter
from apt.pruning.units import UnitGroup
from apt.records import RepairNote
from apt.repair.moments import Collector
from apt.repair.solve import Solution, solve


@dataclass(frozen=True)
class _Reader:
    """A projection before the cut: its frozen weight and bias, live parts, and the weight as it acts."""

    linear: APTAdapter
    weight: Tensor
    bias: Tensor | None
    acting: Tensor  # adapter merged in, but for one that depends on the example

    @classmethod
    def of(cls, linear: APTAdapter) -> "_Reader":
        weight, bias = linear.view()
        weight, bias = weight.detach().clone(), None if bias is None else bias.detach().clone()
        acting = linear.merged_weight() if linear.rank and linear.row_gate is None else weight
        return cls(linear, weight, bias, acting)

    def put(self, columns: Tensor | None = None, solution: Solution | None = None) -> None:
        """Write the weight into the linear: as it was, with what a solution adds to the columns that stay."""
        live, live_bias = self.linear.view()
        live.data.copy_(self.weight)
        if live_bias is not None and self.bias is not None:
            live_bias.data.copy_(self.bias)
        if solution is None or solution.ridge is None:
            return
        live.data[:, columns] = (self.weight[:, columns].double() + solution.weight).to(live.dtype)
        if live_bias is not None and self.bias is not None and solution.bias is not None:
            live_bias.data.copy_(self.bias.double() + solution.bias)


class Repairer:
    """Repairs the projections that read the units of some groups, from the weights that they have now.

    Args:
        groups: heads and neurons of a patched model; of hidden dimensions there is nothing to repair here.
        keep_dense: whether a teacher reads the weights, which then keeps its own.
    """

    def __init__(self, groups: Sequence[UnitGroup], *, keep_dense: bool = False) -> None:
        self.groups = list(groups)
        self.keep_dense = keep_dense
        self._readers = {group.name: _Reader.of(group.reader) for group in groups}

    @torch.no_grad()
    def repair(
        self, kept: Mapping[str, Sequence[int]], collectors: Mapping[str, Collector], *, choose_ridge: bool = True
    ) -> dict[str, RepairNote]:
        """Write into every projection what its kept columns give in place of those that go.

        The columns of the units that go are left: a mask shuts them, or surgery cuts them next.

        Args:
            kept: positions that stay, by unit group.
            collectors: moments of the inputs, at open masks, by unit group.
            choose_ridge: by the error on what was held out; otherwise one that mostly does.

        Returns:
            What was done, by unit group; nothing for a group that loses no unit.

        Raises:
            FloatingPointError: a moment holds a number that is NaN or infinite.
        """
        notes = {}
        for group in self.groups:
            reader = self._readers[group.name]
            positions = kept.get(group.name)
            if positions is None or len(positions) == group.num_units:
                reader.put()
                continue
            device = reader.weight.device
            columns = columns_of(group, positions)
            collector = collectors[group.name]
            held_out = collector.held_out if choose_ridge else None
            held_out = None if held_out is None else held_out.to(device)
            try:
                solution = solve(
                    reader.acting, collector.fit.to(device), held_out, columns, with_bias=reader.bias is not None
                )
            except FloatingPointError as error:
                raise FloatingPointError(f"repair: of {group.name} {error}; look at the calibration batches") from None
            if self.keep_dense:
                reader.linear.keep_dense()
            reader.put(columns, solution)
            notes[group.name] = RepairNote(ridge=solution.ridge, before=solution.before, after=solution.after)
        return notes

    @contextmanager
    def as_it_was(self, groups: Sequence[UnitGroup]) -> Iterator[None]:
        """These units open, and what reads them with its weights of before the cut, inside."""
        readers = [self._readers[group.name] for group in groups]
        masks = [(group.mask, group.mask.values.clone()) for group in groups]
        written = [[None if live is None else live.detach().clone() for live in r.linear.view()] for r in readers]
        try:
            for mask, values in masks:
                mask.set_mask(torch.ones_like(values))
            for reader in readers:
                reader.put()
            yield
        finally:
            for mask, values in masks:
                mask.set_mask(values)
            for reader, kept in zip(readers, written, strict=True):
                for live, saved in zip(reader.linear.view(), kept, strict=True):
                    if live is not None and saved is not None:
                        live.data.copy_(saved)

    @torch.no_grad()
    def change(self, group: UnitGroup, columns: Tensor, solution: Solution) -> None:
        """Add a solution to the projection that reads these units, on top of what was written into it."""
        linear = self._readers[group.name].linear
        if self.keep_dense:
            linear.keep_dense()
        live, live_bias = linear.view()
        live.data[:, columns] = (live[:, columns].double() + solution.weight).to(live.dtype)
        if live_bias is not None and solution.bias is not None:
            live_bias.data.copy_(live_bias.double() + solution.bias)

    @torch.no_grad()
    def undo(self) -> None:
        """Write into every projection what it was; what a teacher has kept of it is the same."""
        for reader in self._readers.values():
            reader.put()


def columns_of(group: UnitGroup, positions: Sequence[int]) -> Tensor:
    """The columns that these units own in the projection that reads them, ascending."""
    device = group.reader.weight.device
    units = torch.tensor(positions, dtype=torch.long, device=device)
    size = group.mask.unit_size
    return (units[:, None] * size + torch.arange(size, device=device)).flatten()
