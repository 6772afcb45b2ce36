"""AdaptiveTuner: ranks that grow in a loop of your own, without a Controller."""

from collections.abc import Iterable

import torch
from torch import nn

from apt.layers import APTAdapter, adapted
from apt.pruning.ranks import TuningConfig, adapter_sizes, plan_ranks, total_params
from apt.pruning.salience import adapter_importance
from apt.surgery.ranks import apply_rank_plan


class AdaptiveTuner:
    """Grows the ranks of a patched model's adapters in a loop of your own, without a `Controller`.

    After ``loss.backward()``: ``tuner.adjust_ranks(tuner.compute_adapter_salience(model.named_parameters()), target)``.

    Args:
        model: with adapters, from `apt.patch_model`.
        max_params: adapter parameters that may ever exist.
        config: rule, strategy, cap and importance; None is the default with the paper's importance.
        optimizer: its moments follow; without one, make the optimizer after the last growth.
    """

    def __init__(
        self,
        model: nn.Module,
        max_params: int,
        *,
        config: TuningConfig | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        if max_params < 1:
            raise ValueError(f"tuner: max_params must be at least 1, got {max_params}")
        if not any(module.rank for _, module in adapted(model)):
            raise ValueError("tuner: the model has no adapters; call apt.patch_model(model) first")
        self.model = model
        self.max_params = max_params
        self.optimizer = optimizer
        self.config = config or TuningConfig(importance="elementwise")

    @property
    def current_params(self) -> int:
        """Adapter parameters now."""
        return total_params(adapter_sizes(self.model, {}))

    def compute_adapter_salience(self, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, float]:
        """Importance of every adapter whose B is among the parameters, from its gradient (paper, eq. 7).

        Args:
            named_parameters: of the model, after a backward pass.

        Raises:
            ValueError: none of them is an adapter's B with a gradient.
        """
        modules: dict[str, APTAdapter] = dict(adapted(self.model))
        found = {name.removesuffix(".lora_B"): p for name, p in named_parameters if name.endswith(".lora_B")}
        salience = {
            name: float(adapter_importance(modules[name], kind=self.config.importance))
            for name, parameter in found.items()
            if name in modules and parameter.grad is not None
        }
        if not salience:
            raise ValueError("tuner: no adapter has a gradient; call compute_adapter_salience after loss.backward()")
        return salience

    def adjust_ranks(self, salience_dict: dict[str, float], target_params: int) -> int:
        """Let the more important adapters grow, and return how many adapter parameters there are then.

        Args:
            salience_dict: from `compute_adapter_salience`, after the last cut.
            target_params: adapter parameters that may exist afterwards; never more than `max_params`.

        Raises:
            ValueError: a name is none of an adapter.
        """
        sizes = adapter_sizes(self.model, salience_dict)
        config = self.config
        unknown = sorted(set(salience_dict) - set(sizes))
        if unknown:
            raise ValueError(f"tuner: salience_dict names {unknown[0]!r}, which is no adapter of this model")
        budget = min(target_params, self.max_params)
        plan = plan_ranks(sizes, 0, budget, config.max_rank, strategy=config.rank_increase_strategy, rule=config.rule)
        apply_rank_plan(self.model, plan, self.optimizer)
        return self.current_params
