"""What an event that repairs costs beside a training step: its moments, and its passes over calibration batches."""

from dataclasses import replace

from torch import Tensor

from apt.pruning.units import UnitGroup
from apt.repair.moments import bytes_of
from apt.runs.estimate.footprint import Footprint, forward_flops
from apt.runs.estimate.simulation import Simulation
from apt.training.controller.calibrated_cut import MOST_BYTES

STREAM_PASSES = 4  # of every batch with repair "stream": for the moments, as it was, and twice as it is cut
STREAMS = (
    6  # of all batches that it keeps: as it was, twice within a layer; as it is cut, before and behind a projection
)


def repairing(simulation: Simulation, step: Footprint) -> Footprint:
    """The footprint of an event that repairs at the present sizes, beside that of a training step.

    A pass for gradients is taken for three passes forward; what is solved afterwards is not counted.

    Args:
        simulation: whose model it is.
        step: of its training, whose memory the event has too: gradients and moments of the optimizer stay.
    """
    groups = [group for group in simulation.controller.groups if isinstance(group, UnitGroup)]
    moments = min(MOST_BYTES, sum(bytes_of(group.reader) for group in groups))
    dense = sum(group.reader.weight.numel() * group.reader.weight.element_size() for group in groups)
    settings = simulation.settings.pruning
    batches = max(settings.moment_batches, settings.calibration_batches)
    streams = 0
    if settings.repair == "stream":
        streams = batches * max(map(_a_token, groups)) * _tokens(simulation.batch)
        batches *= STREAM_PASSES
    passes = batches + settings.calibration_batches * (2 + 3 * (settings.rounds - 1))
    products = sum(2 * _tokens(simulation.batch) * group.reader.n_in**2 for group in groups)
    flops = passes * forward_flops(simulation.model, simulation.batch) + batches * products
    simulation.model.train()
    kept = {**step.bytes_of, "temporaries": step.bytes_of["temporaries"] + moments + dense + streams}
    return replace(step, bytes_of=kept, flops=flops)


def _a_token(group: UnitGroup) -> int:
    """Bytes of the streams around a projection and of what it reads."""
    return (STREAMS * group.reader.n_out + group.reader.n_in) * group.reader.weight.element_size()


def _tokens(batch: dict[str, Tensor]) -> int:
    return batch["input_ids"].numel()
