"""The rivals of pruning while training: LoRA, then all units that go at once, then LoRA again at that size.

All begin with the model that the arm "lora" of the same seed left, its adapter merged, and differ in what they cut:
``prune-PERCENT`` by this project's salience over calibration batches (`prune_before_tuning`), ``tp-magnitude-PERCENT``
and ``tp-taylor-PERCENT`` by Torch-Pruning's group importances, at its default of equal counts in every layer.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import apt
from apt.runs.config import RunConfig
from bench.training import Course, block_parameters, peft_lora, train

CUT_AT_ONCE = [
    "pruning.prune_before_tuning=true",
    "tuning.adaptive_rank_update=false",
    "distillation.use_self_distillation=false",
]
# One cut, chosen as `apt.compress` chooses, where the schedule has its first event: what every run with a repair is
# measured with.
FISHER = [
    *("pruning.num_events=1", "pruning.salience=fisher", "pruning.balance=none", "pruning.kurtosis=off"),
    *("pruning.repair=off", "pruning.rounds=1"),
]
REPAIRED = [*FISHER, "pruning.repair=weights"]
CRITERIA = {"tp-magnitude": "GroupMagnitudeImportance", "tp-taylor": "GroupTaylorImportance"}
KINDS = ("prune", *CRITERIA)


def cut_and_retrain(
    kind: str, model: Any, config: RunConfig, data: Any, tokenizer: Any, course: Course
) -> tuple[Any, dict[str, Any]]:
    """The trainer at the end and what cutting and retraining cost; the model is `trainer.model`, adapters on it."""
    course.start()  # the cut is part of training
    if kind == "prune":
        return train(apt.patch_model(model, config.apt_config()), config, data, tokenizer, course, ours=True)
    cut(model, kind, config.pruning.target_sparsity, calibration(config, data))
    return train(peft_lora(model, config), config, data, tokenizer, course)


def calibration(config: RunConfig, data: Any, count: int | None = None) -> list[Mapping[str, Tensor]]:
    """As many batches of training data as `prune_before_tuning` takes, or `count`, drawn in the same way."""
    size, count = config.training.batch_size, count or config.pruning.calibration_batches
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(config.training.seed)).tolist()
    starts = range(0, min(len(order), size * count), size)
    return [data.collator([data.train[index] for index in order[start : start + size]]) for start in starts]


def cut(model: Any, kind: str, sparsity: float, batches: list[Mapping[str, Tensor]]) -> None:
    """Remove heads and neurons of a BERT classifier by Torch-Pruning, until `sparsity` of its block parameters is gone.

    Every layer keeps as many heads as the sparsity leaves, rounded, at least one, and as many neurons as then fit.

    Raises:
        ImportError: torch-pruning is not installed.
        ValueError: the model is no BERT, or its sparsity cannot be reached with a head in every layer.
    """
    try:
        import torch_pruning
    except ImportError:
        raise ImportError('bench: this arm needs torch-pruning; pip install "apt-lm[bench]"') from None
    if model.config.model_type != "bert":
        raise ValueError(f"bench: Torch-Pruning is set up for BERT here, not for {model.config.model_type}")
    heads, neurons = _sizes(model, sparsity)
    layers, num_heads = model.bert.encoder.layer, model.config.num_attention_heads
    attentions = [layer.attention.self for layer in layers]
    projections = [linear for one in attentions for linear in (one.query, one.key, one.value)]
    wide = [layer.intermediate.dense for layer in layers]
    device = next(model.parameters()).device
    batches = [{key: value.to(device) for key, value in batch.items()} for batch in batches]
    model.requires_grad_(True).eval()  # the graph is traced by autograd
    if kind == "tp-taylor":
        for batch in batches:
            model(**batch).loss.backward()
    pruner = torch_pruning.pruner.BasePruner(
        model,
        {key: value for key, value in batches[0].items() if key != "labels"},
        importance=getattr(torch_pruning.importance, CRITERIA[kind])(),
        # Half a unit beside what stays: it rounds neurons down and removed heads up.
        pruning_ratio=1.0 - (neurons + 0.5) / wide[0].out_features,
        head_pruning_ratio=1.0 - (heads + 0.5) / num_heads,
        num_heads=dict.fromkeys(projections, num_heads),
        prune_num_heads=True,
        prune_head_dims=False,
        ignored_layers=[module for module in model.modules() if _outside(module, {*projections, *wide})],
        output_transform=lambda output: output.logits.sum(),
    )
    pruner.step()
    for attention in attentions:
        attention.num_attention_heads = pruner.num_heads[attention.query]
        attention.all_head_size = attention.query.out_features
    model.zero_grad(set_to_none=True)


def _outside(module: nn.Module, pruned: set[nn.Module]) -> bool:
    """Whether the outputs of a module are hidden dimensions or classes, which stay."""
    return isinstance(module, nn.Linear | nn.Embedding | nn.LayerNorm) and module not in pruned


def _sizes(model: Any, sparsity: float) -> tuple[int, int]:
    """Heads and neurons that each layer keeps, so that at least `sparsity` of the block parameters is gone."""
    config = model.config
    hidden, count = config.hidden_size, config.num_hidden_layers
    head = hidden // config.num_attention_heads * (4 * hidden + 3)  # rows of q, k, v with biases; columns of o
    neuron = 2 * hidden + 1
    left = (1.0 - sparsity) * block_parameters(model) / count
    stays = block_parameters(model) / count - config.num_attention_heads * head - config.intermediate_size * neuron
    heads = max(1, round((1.0 - sparsity) * config.num_attention_heads))
    neurons = int((left - stays - heads * head) // neuron)
    if neurons < 1:
        raise ValueError(f"bench: a sparsity of {sparsity} leaves no neuron beside {heads} heads a layer; ask for less")
    return heads, min(neurons, config.intermediate_size)
