"""The correction of the streams of a whole model, stack by stack."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from torch import nn

from apt.families import Anatomy, Layer
from apt.layers.layer_mask import layer_mask
from apt.layers.passes import passes_of
from apt.pruning.units import UnitGroup
from apt.repair.calls import Recorded, recording
from apt.repair.repairer import Repairer, columns_of
from apt.repair.stream import CutLayer, Sweep


@dataclass(frozen=True)
class BottomUp:
    """Corrects what reads the units of a model, from its first layer to its last, once they are chosen and repaired.

    Args:
        anatomy: of the patched model, its masks and weights those of the cut.
        repairer: of the groups, with the weights of before.
        let_pass: lets all batches pass through the model, as far as the modules that it is given.
        num_batches: that pass.
    """

    anatomy: Anatomy
    repairer: Repairer
    let_pass: Callable[[Sequence[nn.Module]], None]
    num_batches: int

    def carry_out(self, kept: Mapping[str, Sequence[int]]) -> dict[str, float]:
        """What `Sweep.run` says of every stack.

        Args:
            kept: positions that stay, by unit group.

        Raises:
            FloatingPointError: a stream holds a number that is NaN or infinite.
        """
        found: dict[str, float] = {}
        stacks = self.anatomy.stacks
        sweep = Sweep(passes_of(self.anatomy.model), self.num_batches)
        for stack in stacks:
            layers = [layer for layer in self.anatomy.layers if layer.stack == stack and not layer.gone]
            groups = [group for group in self.repairer.groups if group.part.layer.stack == stack]
            if not groups or not layers:
                continue
            cut = self._recorded(layers, groups)
            dense = cut
            if len(stacks) > 1:  # a decoder reads its encoder, as that was and as it is
                with self._as_it_was(self.anatomy.layers):
                    dense = self._recorded(layers, groups)
            found |= sweep.run([self._cut_layer(layer, kept) for layer in layers], dense, cut)
        return found

    def _recorded(self, layers: Sequence[Layer], groups: Sequence[UnitGroup]) -> Recorded:
        modules = [layer.module for layer in layers]
        with recording(modules, passes_of(self.anatomy.model), groups[0].mask.valid) as recorded:
            self.let_pass(modules)
        return recorded

    def _cut_layer(self, layer: Layer, kept: Mapping[str, Sequence[int]]) -> CutLayer:
        mask = layer_mask(layer.module)
        goes = mask is not None and not bool(mask.values.any())
        groups = [] if goes else self._groups_in([layer])
        return CutLayer(
            module=layer.module,
            groups={group.reader: group for group in groups},
            kept={group.reader: columns_of(group, kept.get(group.name, range(group.num_units))) for group in groups},
            as_it_was=lambda: self._as_it_was([layer]),
            change=self.repairer.change,
        )

    def _groups_in(self, layers: Sequence[Layer]) -> list[UnitGroup]:
        names = {layer.name for layer in layers}
        return [group for group in self.repairer.groups if group.holder in names]

    @contextmanager
    def _as_it_was(self, layers: Sequence[Layer]) -> Iterator[None]:
        """These layers before the cut, inside."""
        with ExitStack() as stack:
            stack.enter_context(self.repairer.as_it_was(self._groups_in(layers)))
            for layer in layers:
                stack.enter_context(_open(layer.module))
            yield


@contextmanager
def _open(layer: nn.Module) -> Iterator[None]:
    """A layer that counts in full, inside."""
    mask = layer_mask(layer)
    if mask is None:
        yield
        return
    values = mask.values.clone()
    mask.set_mask(values.new_ones(values.shape))
    try:
        yield
    finally:
        mask.set_mask(values)
