"""What a run saves and how that is counted: block parameters, or the time of a forward pass on this device."""

from apt.families import Anatomy
from apt.pruning import PruningConfig, UnitSearch
from apt.pruning.latency_table import LatencyTable
from apt.pruning.units import block_params, unit_masks
from apt.training.measure_latency import measure_latency


class Goal:
    """The budget of a run: its total, what is left of it, and the search that spends it.

    Args:
        anatomy: of a patched model.
        config: the target, and the forward pass whose time counts.
        total: block parameters of the original model.
        table: latency table, where `target_speedup` is the target and one is there already.
    """

    def __init__(self, anatomy: Anatomy, config: PruningConfig, total: int, table: LatencyTable | None = None) -> None:
        self.anatomy, self.config = anatomy, config
        self.by_time = config.target_speedup is not None
        self.params_total = total
        self.table = table if self.by_time else None
        self._search: UnitSearch | None = None

    @property
    def search(self) -> UnitSearch:
        """The search over the units; where time counts its first use measures the table, unless one was given."""
        if self._search is None:
            if self.by_time and self.table is None:
                config = self.config
                size, length = config.latency_batch_size, config.latency_length
                self.table = measure_latency(self.anatomy, size, length)
            total = self.params_total if self.table is None else self.table.dense_ms
            self._search = UnitSearch(total, self.config, self.table)
        return self._search

    def take_table(self, table: LatencyTable) -> None:
        """Go on with the table that the run has begun with, so that no decision depends on measuring again."""
        self.table, self._search = table, None

    def live(self) -> float:
        """What is left: block parameters, or milliseconds."""
        if self.table is None:
            return block_params(self.anatomy)
        masks = unit_masks(self.anatomy)
        return self.table.total_ms({name: 0 if mask is None else mask.num_units for name, mask in masks.items()})

    def predicted_speedup(self) -> float | None:
        """How many times as fast the model is now; None where parameters are counted, or nothing was priced yet."""
        return None if self.table is None else self.table.dense_ms / self.live()
