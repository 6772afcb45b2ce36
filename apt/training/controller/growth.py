"""The tuning half of a run: the importance of adapters over its steps, and the ranks that grow by it."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from apt.apt_config import APTConfig
from apt.layers import adapted
from apt.pruning.ranks import adapter_sizes, plan_ranks, total_params
from apt.pruning.salience import MovingAverage, adapter_importance
from apt.records import Plan, RankPlan
from apt.surgery import patch_state
from apt.training.controller.phase import Phase
from apt.training.controller.progress import Progress
from apt.training.controller.timeline import Timeline


class Growth(Phase):
    """Chooses the ranks that grow at the events of a run. It does not say when.

    Args:
        model: patched.
        config: how importance is measured, and how far ranks grow.
        timeline: the events at which they grow, and the budget at a step.
    """

    absent: ClassVar[Mapping[str, Any]] = {"start_params": 0, "importance": {}}

    def __init__(self, model: nn.Module, config: APTConfig, timeline: Timeline) -> None:
        self.model = model
        self.config = config
        self.timeline = timeline
        self.importance = MovingAverage(config.momentum_salience)
        self.start_params = 0  # adapter parameters at the start of tuning, from which the budget grows
        self.start()

    def start(self) -> None:
        """Tuning starts with the adapters as they are now, or as they were before a rank grew in an earlier run."""
        state = patch_state(self.model)
        if state.adapter_params is None or not any(event.rank is not None for event in state.past):
            state.adapter_params = total_params(adapter_sizes(self.model, {}))
        self.start_params = state.adapter_params

    @property
    def scored(self) -> bool:
        """Whether ranks can be chosen: a step has given importance, or there is no adapter to have one."""
        return bool(self.importance.values) or not self.start_params

    def after_backward(self, progress: Progress, grad_scale: float, *, finite: bool) -> None:
        """Take the importance that the gradients give into the average, while an event is to come."""
        if not (finite and progress.active and self.config.grows):
            return
        growing = {name: module for name, module in adapted(self.model) if module.rank}
        kind = self.config.tuning.importance
        self.importance.update({name: adapter_importance(growing[name], grad_scale, kind) for name in growing})

    def can_decide(self, event: int) -> bool:
        """Whether there is importance; where units go too, their scores alone say when."""
        return self.scored or event in self.timeline.prune_steps

    def decide(self, event: int) -> RankPlan | None:
        """The ranks that the budget of the event lets grow, at the adapters' present sizes."""
        if event not in self.timeline.tuning.events:
            return None
        tuning = self.config.tuning
        importance = {name: float(value) for name, value in self.importance.values.items()}
        sizes = adapter_sizes(self.model, importance)
        params = patch_state(self.model).params_before
        budget = tuning.budget(self.timeline.tuning, event, self.start_params, params)
        strategy = tuning.rank_increase_strategy
        return plan_ranks(sizes, event, budget, tuning.max_rank, strategy=strategy, rule=tuning.rule)

    def follow(self, plan: Plan) -> None:
        """Let importance start anew after a growth."""
        if isinstance(plan, RankPlan):
            self.importance.reset()

    def state_dict(self) -> dict[str, Any]:
        return {"start_params": self.start_params, "importance": dict(self.importance.values)}

    def load_state_dict(self, state: Mapping[str, Any], progress: Progress) -> None:
        self.start_params = state["start_params"]
        patch_state(self.model).adapter_params = self.start_params
        self.importance.values = dict(state["importance"])
