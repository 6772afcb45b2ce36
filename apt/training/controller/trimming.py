"""The ranks that a method's budget masks on the way and removes in the end."""

from collections.abc import Mapping
from typing import Any, ClassVar

from apt.methods import RankBudget
from apt.records import TrimPlan
from apt.training.controller.phase import Phase
from apt.training.controller.progress import Progress


class Trimming(Phase):
    """Hands a method's budget of ranks the moments of a run. It is asked for a plan after every step.

    Args:
        budget: of the method.
    """

    absent: ClassVar[Mapping[str, Any]] = {"rank_budget": None}

    def __init__(self, budget: RankBudget) -> None:
        self.budget = budget

    def after_backward(self, progress: Progress, grad_scale: float, *, finite: bool) -> None:
        if finite:
            self.budget.after_backward(progress.step + 1, grad_scale)

    def decide(self, event: int) -> TrimPlan | None:
        return self.budget.after_step(event)

    def settled(self, step: int) -> bool:
        return self.budget.settled(step)

    def state_dict(self) -> dict[str, Any]:
        return {"rank_budget": [self.budget.start, self.budget.target]}

    def load_state_dict(self, state: Mapping[str, Any], progress: Progress) -> None:
        self.budget.start, self.budget.target = state["rank_budget"]
