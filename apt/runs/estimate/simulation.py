"""A patched model of fake tensors at a moment of a run: exact sizes, no numbers."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from apt.apt_config import APTConfig
from apt.families import anatomy_of
from apt.layers import adapted
from apt.pruning import UnitSearch
from apt.pruning.ranks import adapter_sizes, plan_ranks
from apt.pruning.units import block_params
from apt.runs.config import RunConfig
from apt.runs.estimate.dry_run import DryRun, build_on_meta
from apt.runs.estimate.footprint import Footprint, measure_step
from apt.runs.models import positions
from apt.runs.tasks import TASKS
from apt.surgery import patch_model, patch_state
from apt.surgery.event import apply_plan
from apt.surgery.moments import OPTIMIZERS
from apt.training.controller import Calibration, Controller, Distillation

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Simulation:
    """A patched model of fake tensors at a moment of a run; where it is `taught`, the model as it begins teaches it."""

    def __init__(
        self,
        config: RunConfig,
        settings: APTConfig,
        plan: DryRun,
        *,
        taught: bool = False,
        after_step: Callable[[], object] = lambda: None,
    ) -> None:
        self.after_step = after_step
        self.config = config
        self.settings = settings
        self.model = build_on_meta(config, "cpu")
        patch_model(self.model, replace(settings, adapter=replace(settings.adapter, svd_cache=None)))
        self.model.train()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = OPTIMIZERS[config.training.optimizer](trained, lr=config.training.learning_rate)
        self.controller = Controller(
            self.model,
            self.optimizer,
            plan.total_steps,
            held_out=lambda _: 0.0,
            calibration=Calibration(lambda _: ()),
        )
        self.teaching = self.controller.distillation if taught else None
        if self.teaching is not None:
            self.teaching.distiller.snapshot()
        self.batch = batch_for(config, self.model, config.training.batch_size, self._longest())

    def _longest(self) -> int:
        """Tokens of a row: as many as the config lets it have, and the model has positions for."""
        data = self.config.data
        length = data.block_length if TASKS[self.config.model.task].packed else data.max_length
        limit = positions(self.model)
        return length if limit is None else min(length, limit)

    def let_masks_fall(self) -> None:
        """As in the window before an event; the masks have no numbers that could say so."""
        for group in self.controller.groups:
            group.mask._masked = True

    def prune(self, saving: float) -> None:
        """Let units go as an event does, at random salience in proportion to what a unit costs."""
        groups = self.controller.groups
        state = patch_state(self.model)
        draw = np.random.default_rng(0)
        with unset_fake_temporarily():
            scores = {g.name: torch.tensor(g.whole_cost() * (0.5 + draw.random(g.num_units))) for g in groups}
            by_params = UnitSearch(state.block_params, replace(self.settings.pruning, target_speedup=None))
            plan = by_params.plan(groups, scores, block_params(anatomy_of(self.model)), 1, saving)
        apply_plan(self.model, plan, self.optimizer, keep_tail=self.teaching is not None)
        if self.teaching is not None:
            self.teaching.follow(plan)

    def grow(self, budgets: list[int]) -> None:
        """Let ranks grow to each budget; which adapters matter is drawn."""
        draw = np.random.default_rng(0)
        tuning = self.settings.tuning
        order = {name: float(draw.random()) for name, _ in adapted(self.model)}
        for step, budget in enumerate(budgets, 1):
            sizes = adapter_sizes(self.model, order)
            strategy = tuning.rank_increase_strategy
            grown = plan_ranks(sizes, step, budget, tuning.max_rank, strategy=strategy, rule=tuning.rule)
            apply_plan(self.model, grown, self.optimizer)

    def step(self, *, taught: bool = True) -> Footprint:
        """The footprint of a training step now; with its teacher, if it has one and is to be `taught`."""
        teaching = self.teaching if taught else None
        if self.teaching is not None:
            self.teaching.distiller.listen(taught)
        adapters: list[Tensor] = [
            p for _, module in adapted(self.model) for p in module.parameters() if p.requires_grad
        ]
        ours = {id(parameter) for parameter in adapters}
        head: list[Tensor] = [p for p in self.model.parameters() if p.requires_grad and id(p) not in ours]
        if self.teaching is not None:
            head += self.teaching.distiller.teacher.head.values()
        accumulate = self.config.training.gradient_accumulation_steps > 1
        groups: dict[str, list[Tensor]] = {
            "adapters": adapters,
            "head": head,
            "temporaries": list(self.batch.values()),
        }
        self.model.train()
        forward = partial(self._forward, teaching)
        found = measure_step(self.model, self.optimizer, forward, groups, accumulate=accumulate)
        self.after_step()
        return found

    def _forward(self, teaching: Distillation | None) -> tuple[Tensor, list[Tensor]]:
        narrow = AUTOCAST.get(self.config.hardware.precision)
        with nullcontext() if narrow is None else torch.autocast("cpu", dtype=narrow):
            output = self.model(**self.batch)
        loss = output.loss
        if teaching is not None:
            every = teaching.config.distill_every
            loss = teaching.change_loss(loss, output, self.batch, -(-teaching.first // every) * every)
        return loss, [value for name, value in output.items() if name.endswith("logits")]


def batch_for(config: RunConfig, model: nn.Module, rows: int, length: int) -> dict[str, Tensor]:
    """What the model is called with, and labels as its task has them."""
    ids = torch.ones(rows, length, dtype=torch.long)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if getattr(model.config, "type_vocab_size", 0) > 1:
        batch["token_type_ids"] = torch.zeros_like(ids)
    return batch | TASKS[config.model.task].targets(ids, config.data)
