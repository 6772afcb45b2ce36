"""The tuning half of a run: the importance of adapters over its steps, and the ranks that grow by it."""

import torch
from torch import nn

from apt.apt_config import APTConfig
from apt.layers import adapted
from apt.pruning.ranks import adapter_sizes, plan_ranks, total_params
from apt.pruning.salience import MovingAverage, adapter_importance
from apt.pruning.schedule import TuningSchedule
from apt.records import RankPlan
from apt.surgery import patch_state
from apt.surgery.ranks import apply_rank_plan


class Growth:
    """Chooses the ranks that grow at the events of a run, and lets them. It does not say when.

    Args:
        model: patched.
        config: how importance is measured, and how far ranks grow.
        schedule: the budget at a step.
    """

    def __init__(self, model: nn.Module, config: APTConfig, schedule: TuningSchedule) -> None:
        self.model, self.config, self.schedule = model, config, schedule
        self.importance = MovingAverage(config.momentum_salience)
        self.start_params = 0  # adapter parameters at the start of tuning, from which the budget grows
        self.start()

    def start(self) -> None:
        """Tuning starts with the adapters as they are now."""
        self.start_params = total_params(adapter_sizes(self.model, {}))

    @property
    def scored(self) -> bool:
        """Whether ranks can be chosen: a step has given importance, or there is no adapter to have one."""
        return bool(self.importance.values) or not self.start_params

    def take(self, grad_scale: float) -> None:
        """Take the importance that the gradients give into the average; `grad_scale` is the loss scaler's factor."""
        if not self.config.grows:
            return
        growing = {name: module for name, module in adapted(self.model) if module.rank}
        kind = self.config.tuning.importance
        self.importance.update({name: adapter_importance(growing[name], grad_scale, kind) for name in growing})

    def grow(self, step: int, optimizer: torch.optim.Optimizer) -> RankPlan:
        """Let ranks grow, on model and optimizer, as far as the budget of the event of a step lets them."""
        plan = self._plan(step)
        apply_rank_plan(self.model, plan, optimizer)
        self.importance.reset()
        return plan

    def _plan(self, step: int) -> RankPlan:
        tuning, params = self.config.tuning, patch_state(self.model).params_before
        sizes = adapter_sizes(self.model, {name: float(value) for name, value in self.importance.values.items()})
        budget = tuning.budget(self.schedule, step, self.start_params, params)
        strategy, rule = tuning.rank_increase_strategy, tuning.rule
        return plan_ranks(sizes, step, budget, tuning.max_rank, strategy=strategy, rule=rule)
