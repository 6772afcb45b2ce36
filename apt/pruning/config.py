"""PruningConfig: how much goes, when, and what must stay."""

from dataclasses import dataclass

from apt.layers.hidden import SITES
from apt.pruning.kinds import UNIT_KINDS, UnitKind
from apt.pruning.salience import KURTOSES, SALIENCES
from apt.pruning.schedule import SCHEDULES, Point, SparsityScheduler, check_point, to_steps
from apt.records import Target

BALANCES = ("type", "none")
LAYOUTS = ("free", "uniform")
REPAIRS = ("off", "weights", "stream")


@dataclass(frozen=True, kw_only=True)
class PruningConfig:
    """How much goes, when, and what must stay."""

    target_sparsity: float = 0.6  # fraction of the block parameters gone at the end, [0, 1)
    target_speedup: float | None = None  # instead of it: forward passes so many times as fast on this device, 1 or more
    latency_batch_size: int = 32  # sentences of that forward pass, at least 1
    latency_length: int = 64  # tokens of each, at least 1
    prune_start: Point = 0.02  # float: fraction of the run; int: optimizer step
    sparsity_warmup: Point = 0.0  # after prune_start, while only ranks grow
    prune_end: Point = 0.40  # the last event
    num_events: int = 5  # 0 or more
    update_frequency: int | None = None  # instead of it: optimizer steps between two events, about; at least 1
    scheduler: str = "cubic"  # how sparsity rises over the events: the paper's cubic
    decay: Point = 0.6  # masks fall for so long before an event; float: fraction of the interval; int: steps
    settle: Point = 0.2  # and rest at 0 or 1 for so long
    round_to: int = 8  # neurons of a layer, and hidden dimensions, come in multiples of this
    min_heads: int = 0  # KV groups every layer keeps
    min_neurons: int = 0  # neurons every layer keeps
    min_hidden: int = 8  # hidden dimensions the model keeps, at least 1
    min_layers: int = 1  # layers every stack keeps, at least 1
    # what is pruned: "head", "neuron", and where they are named "hidden" dimensions and whole layers ("layer")
    unit_types: tuple[str, ...] = ("head", "neuron")
    hidden_sites: str = "read"  # where hidden dimensions are scored: "read" by a layer, or "write", output and down
    prune_before_tuning: bool = False  # all at once before step 1, from static scores; no pruning event comes later
    calibration_batches: int = 32  # of training data, summed into these scores; at least 1
    salience: str = (
        "product_of_sums"  # of a unit; "sum_of_products", "gate_taylor" keep activations; "fisher", "obs", "magnitude"
    )
    repair: str = (
        "off"  # at an event: "weights" gives what goes to what stays; "stream" also what layers before have lost
    )
    rounds: int = 1  # with a repair: the units of an event are chosen in so many, scored anew between them; at least 1
    moment_batches: int = 64  # with a repair: training batches whose inputs it is fitted to; at least 1
    kurtosis: str | None = None  # added to it: "off", "paper", "normalized", "original"; null: paper in decoders only
    balance: str = "type"  # "type": densities over the mean of their kind of unit; "none": as they are
    layout: str = "free"  # "free": each layer its own counts; "uniform": as many heads and neurons in every layer

    def __post_init__(self) -> None:
        if not 0.0 <= self.target_sparsity < 1.0:
            raise ValueError(f"pruning: target_sparsity must be in [0, 1), got {self.target_sparsity}")
        if self.target_speedup is not None and not 1.0 <= self.target_speedup < float("inf"):
            raise ValueError(f"pruning: target_speedup must be at least 1, got {self.target_speedup}")
        object.__setattr__(self, "unit_types", tuple(self.unit_types))
        if not self.unit_types or not set(self.unit_types) <= UNIT_KINDS.keys():
            raise ValueError(f"pruning: unit_types must be some of {list(UNIT_KINDS)}, got {list(self.unit_types)}")
        choices = {
            "salience": SALIENCES,
            "hidden_sites": SITES,
            "kurtosis": (None, *KURTOSES),
            "balance": BALANCES,
            "scheduler": SCHEDULES,
            "layout": LAYOUTS,
            "repair": REPAIRS,
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"pruning: {name} must be one of {list(known)}, got {getattr(self, name)!r}")
        for name in ("prune_start", "sparsity_warmup", "prune_end", "decay", "settle"):
            check_point("pruning", name, getattr(self, name))
        if self.num_events < 0 or self.min_heads < 0 or self.min_neurons < 0:
            raise ValueError("pruning: num_events, min_heads and min_neurons must be at least 0")
        if self.round_to < 1 or self.min_hidden < 1 or self.min_layers < 1:
            raise ValueError("pruning: round_to, min_hidden and min_layers must be at least 1")
        if self.update_frequency is not None and self.update_frequency < 1:
            raise ValueError(f"pruning: update_frequency must be at least 1, got {self.update_frequency}")
        for name in ("calibration_batches", "moment_batches", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"pruning: {name} must be at least 1, got {getattr(self, name)}")
        self._check_repair()
        if self.salience == "magnitude" and self.kurtosis not in (None, "off"):
            raise ValueError(
                f"pruning: salience 'magnitude' takes no statistics, so kurtosis must be 'off', got {self.kurtosis!r}"
            )
        if min(self.latency_batch_size, self.latency_length) < 1:
            raise ValueError("pruning: latency_batch_size and latency_length must be at least 1")
        self._check_layers()
        untimed = [kind.name for kind in self.kinds if not kind.timed]
        if self.target_speedup is not None and untimed:
            raise ValueError(
                f"pruning: target_speedup prices heads and neurons; leave {untimed[0]!r} out of unit_types"
            )
        without = self.num_events == 0 and self.update_frequency is None
        if without and self.target_saving > 0.0 and not self.prune_before_tuning:
            goal = "target_sparsity" if self.target_speedup is None else "target_speedup"
            raise ValueError(f"pruning: {goal} {getattr(self, goal)} needs num_events of at least 1, got 0")

    def _check_repair(self) -> None:
        """Raise ValueError where a repair, or a choice that knows it, is asked for with what it does not go with."""
        if self.rounds > 1 and self.repair == "off":
            raise ValueError("pruning: rounds are of events that repair; set repair='weights', or rounds=1")
        if self.salience == "obs" and self.repair == "off" and self.target_saving > 0.0:
            raise ValueError(
                "pruning: salience 'obs' weighs what a repair cannot give back; set repair='weights', or take 'fisher'"
            )
        if self.salience == "obs" and self.kurtosis not in (None, "off"):
            raise ValueError(
                f"pruning: salience 'obs' takes no outlier term, so kurtosis must be 'off', got {self.kurtosis!r}"
            )
        if self.salience == "obs" and "hidden" in self.unit_types:
            raise ValueError("pruning: hidden dimensions have no salience 'obs', as no repair is theirs; take 'fisher'")
        if self.repair == "stream" and "hidden" in self.unit_types:
            raise ValueError(
                "pruning: repair 'stream' compares streams of one width; set repair='weights', or leave 'hidden' out"
            )

    def _check_layers(self) -> None:
        """Raise ValueError where whole layers are to go in a way that is not known."""
        if not any(kind.holds_units for kind in self.kinds):
            return
        if self.salience == "magnitude":
            raise ValueError(
                "pruning: layers go by block influence, which salience 'magnitude' takes no data for; choose another, "
                "or leave 'layer' out of unit_types"
            )
        inside = [kind.name for kind in self.kinds if kind.timed]
        if self.layout == "uniform" and inside:
            raise ValueError(
                f"pruning: layout 'uniform' knows layers alone or not at all; leave 'layer' or {inside[0]!r} out of "
                f"unit_types"
            )

    @property
    def kinds(self) -> list[UnitKind]:
        """The kinds of units that are pruned."""
        return [UNIT_KINDS[name] for name in self.unit_types]

    def floor_of(self, kind: UnitKind) -> int:
        """Units of a kind that stay, in every layer or, of a kind across layers, in the model."""
        return 0 if kind.floor is None else int(getattr(self, kind.floor))

    @property
    def target_saving(self) -> float:
        """What should be gone at the end, as a fraction: of the block parameters, or of the time of a forward pass."""
        return self.target_sparsity if self.target_speedup is None else 1.0 - 1.0 / self.target_speedup

    def target_at(self, saving: float) -> Target:
        """A saving as plans and events tell it."""
        if self.target_speedup is None:
            return Target(sparsity=saving)
        return Target(speedup=1.0 / (1.0 - saving))

    def events_in(self, total_steps: int) -> int:
        """How many events a run of so many optimizer steps has."""
        if self.update_frequency is None:
            return self.num_events
        window = to_steps(self.prune_end, total_steps) - to_steps(self.prune_start, total_steps)
        return max(1, window // self.update_frequency)

    def schedule(self, total_steps: int) -> SparsityScheduler:
        """The schedule of a run of that many optimizer steps; a run that is too short raises ValueError.

        With `target_speedup` it is one of the time saved: at a value v the model is 1 / (1 - v) times as fast. With
        `prune_before_tuning` it has no events: all is done before step 1.
        """
        return SparsityScheduler(
            total_steps,
            self.target_saving,
            schedule_type=self.scheduler,
            prune_start=self.prune_start,
            prune_end=self.prune_end,
            sparsity_warmup=self.sparsity_warmup,
            num_events=0 if self.prune_before_tuning else self.events_in(total_steps),
            decay=self.decay,
            settle=self.settle,
        )
