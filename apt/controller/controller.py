"""When: asks the rooms above for scores and plans, hands the plans to surgery, keeps the events."""

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apt.adapters import adapted
from apt.controller.config import APTConfig
from apt.controller.state import patch_state
from apt.families import find_family
from apt.pruner import AdaptivePruner
from apt.records import Event, PrunePlan, RankPlan, append_jsonl
from apt.salience import MovingAverage, OutlierTerm, adapter_importance, not_finite, unit_scores
from apt.surgery import apply_prune_plan, apply_rank_plan
from apt.tuner import AdapterSize, plan_ranks
from apt.units import UnitGroup, block_params, find_units

BUILT_IN = ("method", "rank", "scale", "target_modules")  # patch_model has built these; a controller cannot change them


class Controller:
    """Prunes and tunes a patched model while your loop trains it.

    ``run = Controller(model, optimizer, total_steps)``; then per optimizer step ``loss = run.loss(output, batch)``,
    ``loss.backward()``, ``run.after_backward()`` once after the last micro-batch and before unscaling or clipping,
    ``optimizer.step()``, ``run.after_step()`` before ``zero_grad``.

    Args:
        model: patched by `apt.patch_model`.
        optimizer: over the trainable parameters; AdamW, Adam or SGD. Its moments follow every event.
        total_steps: optimizer steps of the run.
        config: None means the one `patch_model` stored.
        scaler: the gradient scaler of fp16 training, if any.
        event_log: a JSON-lines file that gets each event.
        overrides: leaves of the config by name; what `patch_model` has built already cannot differ.

    Raises:
        ValueError: an unknown or conflicting setting, a run too short for its schedule, a sparsity that the floors
            exclude, a model without prunable units, or more than one process.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        total_steps: int,
        config: APTConfig | None = None,
        *,
        scaler: Any = None,
        event_log: Path | None = None,
        **overrides: Any,
    ) -> None:
        state = patch_state(model)
        self.config = (config or state.config).with_overrides(**overrides)
        for name in BUILT_IN:
            asked, built = getattr(self.config, name), getattr(state.config, name)
            if asked != built:
                raise ValueError(
                    f"controller: the model was patched with {name}={built!r}, got {asked!r}; patch it anew"
                )
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed and torch.distributed.get_world_size() > 1:
            raise ValueError("controller: this version prunes in one process; train on one device")
        self.model, self.total_steps, self.scaler, self.event_log = model, total_steps, scaler, event_log
        self.optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        self.step = 0
        self.events: list[Event] = []
        self.salience = MovingAverage(self.config.momentum_salience)
        self.importance = MovingAverage(self.config.momentum_salience)
        self.outliers = OutlierTerm("off")
        self.groups: list[UnitGroup] = []
        self._event_steps: list[int] = []
        self._batch: dict[str, Any] | None = None
        self._start_params = _adapter_params(model)
        if self.config.method == "apt" and self.config.pruning.num_events:
            self._plan_run(state.block_params)

    def _plan_run(self, total: int) -> None:
        """Check that the schedule and the target can be met, and open the gates' statistics."""
        self.schedule = self.config.pruning.schedule(self.total_steps)
        self._event_steps = self.schedule.events
        self.family = find_family(self.model)
        self.total = total
        self.pruner = AdaptivePruner(total, self.config.pruning)
        self.outliers = OutlierTerm(self.config.pruning.kurtosis or ("paper" if self.family.decoder else "off"))
        self._find_groups()
        self.pruner.check(self.groups, block_params(self.model, self.family))
        self._collect(True)

    def _find_groups(self) -> None:
        pruning = self.config.pruning
        self.groups = find_units(self.model, self.family, min_heads=pruning.min_heads, min_neurons=pruning.min_neurons)

    def _collect(self, on: bool) -> None:
        for group in self.groups:
            group.gate.collecting = on
            group.gate.products = self.config.pruning.salience != "product_of_sums"
            group.gate.totals = self.outliers.needs_total(group)
            group.gate.reset_sums()

    @property
    def active(self) -> bool:
        """Whether an event is still to come."""
        return len(self.events) < len(self._event_steps)

    def loss(self, output: Any, batch: Mapping[str, Any] | None = None) -> Tensor:
        """The loss to differentiate: the task's, and what the method adds to it.

        Args:
            output: what the model returned: an output with ``.loss``, a mapping with ``"loss"``, or the loss itself.
            batch: the inputs, kept when `verify_events` is on.

        Raises:
            FloatingPointError: the loss is NaN or infinite; the parameters are still those of the step before.
        """
        loss = output if isinstance(output, Tensor) else output["loss"] if isinstance(output, Mapping) else output.loss
        if not torch.isfinite(loss.detach()).all():
            raise FloatingPointError(
                f"controller: the loss is {loss.detach().mean().item()} at step {self.step + 1}; the parameters are "
                f"still those of step {self.step}; lower the learning rate or check the data"
            )
        if self.config.verify_events and batch is not None:
            self._batch = dict(batch)
        return loss

    def after_backward(self) -> None:
        """Take in the statistics of one optimizer step: call after its last micro-batch, before unscaling or clipping.

        Raises:
            FloatingPointError: a gradient is NaN or infinite (with a scaler the step is dropped instead, as it does),
                or the salience of a unit is.
        """
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        norms = torch._foreach_norm(grads) if grads else []
        finite = bool(torch.isfinite(torch.stack([norm.float() for norm in norms])).all()) if norms else True
        if not finite and self.scaler is None:
            raise FloatingPointError(
                f"controller: a gradient is NaN or infinite at step {self.step + 1}; the parameters are still those of "
                f"step {self.step}; lower the learning rate or check the data"
            )
        if not self.active:
            return
        if finite:
            scale = 1.0 if self.scaler is None else float(self.scaler.get_scale())
            salience = self.config.pruning.salience
            scores = {group.name: unit_scores(group, scale, salience) for group in self.groups}
            scores = self.outliers.add(self.groups, scores)
            for name in not_finite(scores):
                raise FloatingPointError(
                    f"controller: the salience of {name} is NaN or infinite at step {self.step + 1}, so no event could "
                    f"choose among its units; look at that layer's activations, or train in a wider dtype"
                )
            self.salience.update(scores)
            if self.config.tuning.adaptive_rank_update:
                adapters = [(name, module) for name, module in adapted(self.model) if module.rank]
                self.importance.update({name: adapter_importance(module, scale) for name, module in adapters})
        for group in self.groups:
            group.gate.reset_sums()

    def after_step(self) -> None:
        """Move the masks, carry out the event that is due: call after ``optimizer.step()``, before ``zero_grad``."""
        self.step += 1
        if not self.active:
            return
        event_step = self._event_steps[len(self.events)]
        begins, settled = self.schedule.windows(len(self.events))
        if not self.salience.values:  # every step so far overflowed under loss scaling; the event waits for a score
            return
        if begins < self.step < settled:
            self._move_masks(1.0 / (settled - begins))
        elif self.step == settled < event_step:
            self._settle_masks()
        if self.step >= event_step:
            self._event()

    def _prune_plan(self) -> PrunePlan:
        """What stays at the next event, from the present scores."""
        step = self._event_steps[len(self.events)]
        scores = {group.name: self.salience.values[group.name] for group in self.groups}
        live = block_params(self.model, self.family)
        return self.pruner.plan(self.groups, scores, live, step, self.schedule.get_current_sparsity(step))

    def _move_masks(self, alpha: float) -> None:
        """One step of the decay: the masks of chosen units rise by alpha, the others fall."""
        kept = self._prune_plan().kept
        for group in self.groups:
            towards = torch.full_like(group.gate.mask, -alpha)
            towards[kept[group.name]] = alpha
            group.gate.set_mask((group.gate.mask + towards).clamp_(0.0, 1.0))

    def _settle_masks(self) -> None:
        """End the decay: what is chosen now stays until the event, and every mask is exactly 0 or 1."""
        kept = self._prune_plan().kept
        for group in self.groups:
            mask = torch.zeros_like(group.gate.mask)
            mask[kept[group.name]] = 1.0
            group.gate.set_mask(mask)

    def _event(self) -> None:
        started = time.perf_counter()
        rested = self.schedule.windows(len(self.events))[1] < self._event_steps[len(self.events)]
        if not rested or not any(group.gate.masked for group in self.groups):  # or no score came in time to decay
            self._settle_masks()
        # The masks say what stays: they may have been settled some steps ago, with the scores of then.
        kept = {group.name: group.gate.mask.nonzero().flatten() for group in self.groups}
        step = self._event_steps[len(self.events)]
        plan = PrunePlan(
            step=step,
            target_sparsity=self.schedule.get_current_sparsity(step),
            kept={name: positions.tolist() for name, positions in kept.items()},
            round_to=self.config.pruning.round_to,
        )
        before, logits = block_params(self.model, self.family), self._logits()
        apply_prune_plan(self.model, plan, self.optimizer)
        for name, positions in kept.items():
            self.salience.keep(name, positions)
        self._find_groups()
        rank_plan = self._rank_plan(step)
        if rank_plan is not None:
            apply_rank_plan(self.model, rank_plan, self.optimizer)
        self.importance.reset()
        self.outliers.reset()
        self._verify(step, logits)
        live = block_params(self.model, self.family)
        event = Event(
            step=step,
            prune=plan,
            rank=rank_plan,
            target_sparsity=plan.target_sparsity,
            sparsity=1.0 - live / self.total,
            removed=(before - live) / self.total,
            block_params=live,
            trainable_params=sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            seconds=time.perf_counter() - started,
        )
        self.events.append(event)
        if "torch._dynamo" in sys.modules:  # shapes are static between events; start the recompile count anew
            torch._dynamo.reset()
        if not self.active:
            self._collect(False)
        if self.event_log is not None:
            append_jsonl(self.event_log, event.to_json())

    def _rank_plan(self, step: int) -> RankPlan | None:
        tuning = self.config.tuning
        if not tuning.adaptive_rank_update:
            return None
        sizes = {
            name: AdapterSize(
                rank=module.rank,
                width=module.n_in + module.n_out,
                importance=float(self.importance.values.get(name, torch.zeros(()))),
            )
            for name, module in adapted(self.model)
            if module.rank
        }
        budget = int(self._start_params * self.schedule.budget_ratio(step, tuning.budget_ratio))
        return plan_ranks(sizes, step, budget, tuning.max_rank)

    @torch.no_grad()
    def _logits(self) -> Tensor | None:
        if not self.config.verify_events or self._batch is None:
            return None
        training = self.model.training
        self.model.eval()
        logits = self.model(**self._batch).logits
        self.model.train(training)
        assert isinstance(logits, Tensor)
        return logits

    def _verify(self, step: int, before: Tensor | None) -> None:
        after = self._logits()
        if before is None or after is None:
            return
        moved = float((after - before).abs().max())
        allowed = {torch.float64: 1e-9, torch.float32: 1e-4}.get(after.dtype, 5e-2) * max(
            1.0, float(before.abs().max())
        )
        if not moved <= allowed:
            raise RuntimeError(
                f"controller: the event of step {step} moved a logit by {moved:.2e} (at most {allowed:.0e})"
            )

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs beside model and optimizer: JSON values and tensors."""
        return {
            "step": self.step,
            "events": [event.to_json() for event in self.events],
            "start_params": self._start_params,
            "salience": dict(self.salience.values),
            "importance": dict(self.importance.values),
            "masks": {group.name: group.gate.mask.clone() for group in self.groups},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up where `state_dict` was made; the model must have the shapes of that moment already."""
        self.step = state["step"]
        self.events = [Event.from_json(row) for row in state["events"]]
        self._start_params = state["start_params"]
        self.salience.values = dict(state["salience"])
        self.importance.values = dict(state["importance"])
        self.outliers.reset()
        for group in self.groups:
            group.gate.set_mask(state["masks"][group.name])
        if not self.active:
            self._collect(False)


def _adapter_params(model: nn.Module) -> int:
    modules = [module for _, module in adapted(model) if module.rank]
    return sum(module.rank * (module.n_in + module.n_out) for module in modules)
