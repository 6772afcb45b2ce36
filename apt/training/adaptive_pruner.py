"""AdaptivePruner: scores, masks and cuts in a loop of your own, without a Controller."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from apt.families import anatomy_of
from apt.pruning import PruningConfig, UnitScores, UnitSearch, move_masks
from apt.pruning.dimensions import Group
from apt.pruning.salience import MovingAverage
from apt.pruning.schedule import SparsityScheduler
from apt.pruning.units import block_params
from apt.records import PrunePlan
from apt.surgery.prune import apply_prune_plan


class AdaptivePruner:
    """Prunes a patched model where and when you say.

    Between a backward pass and ``optimizer.zero_grad()``::

        salience = pruner.compute_salience()
        masks = pruner.generate_mask(salience, scheduler.get_current_sparsity(step))
        pruner.apply_mask(masks, alpha=0.01)  # let them fall a little
        pruner.apply_mask(masks)  # or cut

    From its construction on the masks of the model collect statistics; `close` ends that. Sparsity counts from the
    model as it is then.

    Args:
        model: from `apt.patch_model`.
        scheduler: its target is checked against the floors of the config.
        config: which units, how they are scored, floors and rounding; None is the default.
        optimizer: its moments follow a cut; without one, make the optimizer after the last cut.
        momentum: of the moving average over calls of `compute_salience`, [0, 1); 0 is no average.

    Raises:
        ValueError: the model is not patched, its family is unknown, or the target cannot be reached.
    """

    def __init__(
        self,
        model: nn.Module,
        scheduler: SparsityScheduler,
        *,
        config: PruningConfig | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        momentum: float = 0.0,
    ) -> None:
        if not hasattr(model, "_apt"):
            raise ValueError("pruner: the model is not patched; call apt.patch_model(model) first")
        if config is not None and config.target_speedup is not None:
            raise ValueError("pruner: target_speedup is a goal of the Controller; leave it out here")
        if config is not None and config.repair != "off":
            raise ValueError("pruner: a Controller repairs, at its events; set repair='off', or use apt.compress")
        self.model = model
        self.scheduler = scheduler
        self.optimizer = optimizer
        self.config = replace(config or PruningConfig(), target_sparsity=scheduler.target_sparsity)
        self.anatomy = anatomy_of(model)
        self._units = UnitScores(self.anatomy, self.config)
        self._search = UnitSearch(block_params(self.anatomy), self.config)
        self._search.check(self.groups, self._search.total)
        self._average = MovingAverage(momentum)
        self._units.collect(True)

    @property
    def groups(self) -> list[Group]:
        """The unit groups at their present sizes."""
        return self._units.groups

    def compute_salience(
        self, activations: Mapping[str, Tensor] | None = None, gradients: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Salience of every unit, ``[num_units]`` by unit group (paper, eq. 4 and 5).

        Args:
            activations: what the units hand on, ``[..., D]`` by unit group, or already summed ``|h|``, ``[D]``; None:
                what the masks have collected since the last call, padding left out.
            gradients: the loss differentiated by them, in the same shapes; None with None.

        Raises:
            ValueError: one is given without the other, or a group or a shape is wrong.
        """
        if (activations is None) != (gradients is None):
            raise ValueError("pruner: give activations and gradients, or neither to take what the masks have collected")
        if activations is not None and gradients is not None:
            for group in self.groups:
                self._hand_in(group, activations.get(group.name), gradients.get(group.name))
        self._average.update(self._units.take())
        return dict(self._average.values)

    def _hand_in(self, group: Group, h: Tensor | None, grad: Tensor | None) -> None:
        """Put statistics of one group where its mask would have collected them."""
        features = group.mask.sums.shape[-1]
        if (
            h is None
            or grad is None
            or h.shape != grad.shape
            or h.shape[-1:] != (features,)
            or group.mask.sums.dim() > 2
            or group.mask.squares
            or group.kind == "layer"
        ):
            shapes = [None if tensor is None else list(tensor.shape) for tensor in (h, grad)]
            raise ValueError(
                f"pruner: {group.name} needs an activation and a gradient of shape [..., {features}], got {shapes}; of "
                f"hidden dimensions, layers, and of salience 'fisher', the masks alone can tell"
            )
        h_TD, grad_TD = (tensor.detach().reshape(-1, features) for tensor in (h, grad))
        products_TD = h_TD * grad_TD
        pair = (products_TD.abs(), products_TD) if group.mask.products else (h_TD.abs(), grad_TD.abs())
        group.mask.sums.copy_(torch.stack([part.sum(0) for part in pair]))
        group.mask.total.copy_(h_TD.sum(0))
        group.mask.count.fill_(len(h_TD))

    def generate_mask(self, salience_scores: dict[str, Tensor], current_sparsity: float) -> dict[str, Tensor]:
        """The masks of a sparsity, 1 kept and 0 pruned, ``[num_units]`` by unit group.

        Args:
            salience_scores: from `compute_salience`.
            current_sparsity: fraction of the block parameters that should be gone, [0, 1).
        """
        live = block_params(self.anatomy)
        plan = self._search.plan(self.groups, salience_scores, live, 0, current_sparsity)
        masks = {group.name: torch.zeros_like(group.mask.values) for group in self.groups}
        for name, positions in plan.kept.items():
            masks[name][positions] = 1.0
        return masks

    def apply_mask(self, masks: dict[str, Tensor], alpha: float | None = None) -> PrunePlan | None:
        """Cut what the masks shut, out of model and optimizer; or let the model's masks move towards them.

        Args:
            masks: from `generate_mask`.
            alpha: None cuts; a number in (0, 1] is the step by which masks rise and fall, and nothing is cut.

        Returns:
            The plan that was carried out, None where masks only moved.

        Raises:
            ValueError: a group is missing, or alpha is out of range.
        """
        kept = {name: mask.nonzero().flatten().tolist() for name, mask in masks.items()}
        missing = [group.name for group in self.groups if group.name not in kept]
        if missing or (alpha is not None and not 0.0 < alpha <= 1.0):
            raise ValueError(f"pruner: alpha must be in (0, 1], got {alpha}; masks are missing for {missing or 'none'}")
        if alpha is not None:
            move_masks(self.groups, kept, alpha)
            return None
        target = self.config.target_sparsity
        rounded = self.config.round_to
        plan = PrunePlan(step=0, target_sparsity=target, kept=kept, round_to=rounded)
        apply_prune_plan(self.model, plan, self.optimizer)
        for name, positions in kept.items():
            self._average.keep(name, torch.tensor(positions, dtype=torch.long))
        self._units.outliers.reset()
        self._units.find()
        self._units.collect(True)
        return plan

    def close(self) -> None:
        """End the collection of statistics; the masks cost nothing from here on."""
        self._units.collect(False)
