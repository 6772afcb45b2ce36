"""Importance and a budget -> the rank of each adapter. Decides only; `apt.surgery` acts."""

from dataclasses import dataclass

from apt.records import RankPlan
from apt.schedule import Point

STRATEGIES = ("top_half",)


@dataclass(frozen=True, kw_only=True)
class TuningConfig:
    """How the adapters' ranks grow."""

    adaptive_rank_update: bool = True  # False: ranks stay
    budget_ratio: float = 4.0  # adapter parameters at prune_end over those at the start, at least 1
    max_rank: int = 64  # of one adapter
    rank_increase_strategy: str = "top_half"  # the more important half of all adapters grows
    init_std: float | None = None  # of new rows of A; None is 1 / sqrt(3 * inputs)
    tune_start: Point | None = None  # float: fraction of the run; int: optimizer step; null: prune_start
    tune_end: Point | None = None  # the last growth, where the budget is full; null: prune_end
    num_tuning_events: int | None = None  # growths, 0 or more; null: num_events, so ranks grow as units go

    def __post_init__(self) -> None:
        if self.budget_ratio < 1.0 or self.max_rank < 1:
            raise ValueError(
                f"tuning: budget_ratio and max_rank must be at least 1, got {self.budget_ratio} and {self.max_rank}"
            )
        if self.rank_increase_strategy not in STRATEGIES:
            raise ValueError(f"tuning: rank_increase_strategy must be one of {list(STRATEGIES)}")
        for name in ("tune_start", "tune_end"):
            point = getattr(self, name)
            if point is not None and (point < 0 or (isinstance(point, float) and point > 1.0)):
                raise ValueError(f"tuning: {name} must be a fraction in [0, 1] or a number of steps, got {point}")
        if self.num_tuning_events is not None and self.num_tuning_events < 0:
            raise ValueError(f"tuning: num_tuning_events must be at least 0, got {self.num_tuning_events}")
        if self.init_std is not None and self.init_std <= 0.0:
            raise ValueError(f"tuning: init_std must be above 0, got {self.init_std}")


@dataclass(frozen=True, kw_only=True)
class AdapterSize:
    """An adapter as the search sees it: rank, live inputs plus outputs, importance."""

    rank: int
    width: int
    importance: float


def plan_ranks(adapters: dict[str, AdapterSize], step: int, budget: int, max_rank: int) -> RankPlan:
    """Grow the more important half of the adapters until the budget is spent (method.md 5.2).

    With ``rate = (budget - now) / sum_top(width * rank) + 1`` each of the top half goes to ``int(rank * rate)``, at
    most `max_rank`; what rounding left over is spent rank by rank in order of importance. No rank falls.

    Args:
        adapters: by name.
        step: optimizer steps done.
        budget: adapter parameters that may exist afterwards.
        max_rank: cap of one rank.
    """
    spare = budget - sum(size.rank * size.width for size in adapters.values())
    open_names = [name for name, size in adapters.items() if size.rank < max_rank]
    top = sorted(open_names, key=lambda name: -adapters[name].importance)[: len(adapters) // 2]
    ranks = {name: adapters[name].rank for name in top}
    if spare > 0 and top:
        rate = spare / sum(adapters[name].width * adapters[name].rank for name in top) + 1.0
        for name in top:
            ranks[name] = min(max_rank, int(adapters[name].rank * rate))
            spare -= (ranks[name] - adapters[name].rank) * adapters[name].width
        growing = True
        while growing:
            growing = False
            for name in top:
                if ranks[name] < max_rank and adapters[name].width <= spare:
                    ranks[name] += 1
                    spare -= adapters[name].width
                    growing = True
    grown = {name: rank for name, rank in ranks.items() if rank > adapters[name].rank}
    return RankPlan(step=step, budget=budget, ranks=grown)
