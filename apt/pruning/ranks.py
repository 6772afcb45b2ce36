"""Importance and a budget -> the rank of each adapter. Decides only; surgery acts."""

from dataclasses import dataclass

from torch import nn

from apt.layers import adapted
from apt.pruning.salience import IMPORTANCES
from apt.pruning.schedule import Point, TuningSchedule, check_point
from apt.records import RankPlan

STRATEGIES = ("top_half", "uniform")
RULES = ("top_half", "paper")


@dataclass(frozen=True, kw_only=True)
class TuningConfig:
    """How the adapters' ranks grow."""

    adaptive_rank_update: bool = True  # False: ranks stay
    budget_ratio: float = 4.0  # adapter parameters at prune_end over those at the start, at least 1
    max_rank: int = 64  # of one adapter
    max_tuning_params_ratio: float | None = None  # adapter parameters over all of the original model, at most; (0, 1]
    rank_increase_strategy: str = "top_half"  # which adapters grow: the more important half, or "uniform": all alike
    # how far: the whole budget goes to them; "paper": to floor(rank * budget / now), which is less
    rule: str = "top_half"
    importance: str = "signed"  # sum over ranks of |sum of B dB|; "elementwise": sum of |B dB| (paper)
    init_std: float | None = None  # of new rows of A; None is 1 / sqrt(3 * inputs)
    tune_start: Point | None = None  # float: fraction of the run; int: optimizer step; null: prune_start
    tune_end: Point | None = None  # the last growth, where the budget is full; null: prune_end
    num_tuning_events: int | None = None  # growths, 0 or more; null: num_events, so ranks grow as units go
    growth_frequency: int | None = None  # instead of it: optimizer steps between two growths, about; at least 1

    def __post_init__(self) -> None:
        if self.budget_ratio < 1.0 or self.max_rank < 1:
            raise ValueError(
                f"tuning: budget_ratio and max_rank must be at least 1, got {self.budget_ratio} and {self.max_rank}"
            )
        choices = {"rank_increase_strategy": STRATEGIES, "rule": RULES, "importance": IMPORTANCES}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"tuning: {name} must be one of {list(known)}, got {getattr(self, name)!r}")
        if self.max_tuning_params_ratio is not None and not 0.0 < self.max_tuning_params_ratio <= 1.0:
            raise ValueError(
                f"tuning: max_tuning_params_ratio must be above 0 and at most 1, got {self.max_tuning_params_ratio}"
            )
        for name in ("tune_start", "tune_end"):
            point = getattr(self, name)
            if point is not None:
                check_point("tuning", name, point)
        if self.num_tuning_events is not None and self.num_tuning_events < 0:
            raise ValueError(f"tuning: num_tuning_events must be at least 0, got {self.num_tuning_events}")
        if self.growth_frequency is not None and self.growth_frequency < 1:
            raise ValueError(f"tuning: growth_frequency must be at least 1, got {self.growth_frequency}")
        if self.growth_frequency is not None and self.num_tuning_events is not None:
            raise ValueError("tuning: num_tuning_events and growth_frequency are one setting; give one of them")
        if self.init_std is not None and self.init_std <= 0.0:
            raise ValueError(f"tuning: init_std must be above 0, got {self.init_std}")

    def budget(self, schedule: TuningSchedule, step: int, start: int, model_params: int) -> int:
        """Adapter parameters that may exist after the growth of a step.

        Args:
            schedule: when ranks grow.
            step: optimizer steps done.
            start: adapter parameters at the start of tuning.
            model_params: of the whole original model, what `max_tuning_params_ratio` is a part of.
        """
        budget = int(start * schedule.budget_ratio(step, self.budget_ratio))
        most = self.max_tuning_params_ratio
        return budget if most is None else min(budget, int(most * model_params))


@dataclass(frozen=True, kw_only=True)
class AdapterSize:
    """An adapter as the search sees it: rank, live inputs plus outputs, importance."""

    rank: int
    width: int
    importance: float


def adapter_sizes(model: nn.Module, importance: dict[str, float]) -> dict[str, AdapterSize]:
    """The adapters of a model as the search sees them; one without an importance has 0."""
    return {
        name: AdapterSize(rank=module.rank, width=module.n_in + module.n_out, importance=importance.get(name, 0.0))
        for name, module in adapted(model)
        if module.rank
    }


def total_params(sizes: dict[str, AdapterSize]) -> int:
    """Parameters of all adapters."""
    return sum(size.rank * size.width for size in sizes.values())


def plan_ranks(
    adapters: dict[str, AdapterSize],
    step: int,
    budget: int,
    max_rank: int,
    *,
    strategy: str = "top_half",
    rule: str = "top_half",
) -> RankPlan:
    """Grow the more important half of the adapters until the budget is spent (method.md 5.2). No rank falls.

    With ``rate = (budget - now) / sum_top(width * rank) + 1`` each of the top half goes to ``int(rank * rate)``, at
    most `max_rank`; what rounding left over is spent rank by rank in order of importance. The rule "paper" instead
    takes each of them to ``floor(rank * budget / now)`` (APT, arXiv 2401.12200, §4.3), which leaves about half of the
    growth unspent.

    Args:
        adapters: by name.
        step: optimizer steps done.
        budget: adapter parameters that may exist afterwards.
        max_rank: cap of one rank.
        strategy: "top_half", or "uniform": all adapters grow by the same factor, whatever their importance.
        rule: "top_half", or "paper".
    """
    now = total_params(adapters)
    names = [name for name, size in adapters.items() if size.rank < max_rank]
    if strategy == "top_half":
        names = sorted(names, key=lambda name: -adapters[name].importance)[: len(adapters) // 2]
    ranks = {}
    if budget > now and names:
        widths = {name: adapters[name].width for name in names}
        present = {name: adapters[name].rank for name in names}
        if rule == "paper":
            ranks = {name: min(max_rank, rank * budget // now) for name, rank in present.items()}
        else:
            ranks = _spend(present, widths, budget - now, max_rank)
    grown = {name: rank for name, rank in ranks.items() if rank > adapters[name].rank}
    return RankPlan(step=step, budget=budget, ranks=grown)


def _spend(present: dict[str, int], widths: dict[str, int], spare: int, max_rank: int) -> dict[str, int]:
    """Raise ranks by one factor, and then one by one in the given order, until no further rank fits."""
    rate = spare / sum(widths[name] * rank for name, rank in present.items()) + 1.0
    ranks = {name: min(max_rank, int(rank * rate)) for name, rank in present.items()}
    spare -= sum((ranks[name] - rank) * widths[name] for name, rank in present.items())
    growing = True
    while growing:
        growing = False
        for name in present:
            if ranks[name] < max_rank and widths[name] <= spare:
                ranks[name] += 1
                spare -= widths[name]
                growing = True
    return ranks
