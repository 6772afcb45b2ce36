"""A training loop of one's own from the parts of the method, without Controller or Trainer.

`train` prunes in three cuts and lets ranks grow after each. What the Controller does besides: masks that fall evenly
before a cut, averages and budgets over a schedule, events on record, checkpoints.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

import apt


def train(
    model: nn.Module, batches: Sequence[Mapping[str, Any]], target_sparsity: float, learning_rate: float = 3e-3
) -> list[float]:
    """Train a model from `apt.patch_model` on the batches, one step each; returns the losses."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    scheduler = apt.SparsityScheduler(len(batches), target_sparsity, "cubic", num_events=3)
    pruner = apt.AdaptivePruner(model, scheduler, optimizer=optimizer, momentum=0.85)
    tuner = apt.AdaptiveTuner(
        model, max_params=2 * apt.AdaptiveTuner(model, 10**12).current_params, optimizer=optimizer
    )
    losses = []
    model.train()
    for step, batch in enumerate(batches, 1):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step <= scheduler.end:
            salience = pruner.compute_salience()
        if step in scheduler.events:
            mask = pruner.generate_mask(salience, scheduler.get_current_sparsity(step))
            # Cuts the weights, and their gradients too.
            pruner.apply_mask(mask)
            importance = tuner.compute_adapter_salience(model.named_parameters())
            tuner.adjust_ranks(importance, tuner.current_params * 3 // 2)
        if step == scheduler.end:
            pruner.close()
        optimizer.zero_grad()
    return losses
