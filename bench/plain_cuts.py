"""What a sceptic cuts before LoRA: whole layers, or the same share of every FFN. Each leaves a plain model for PEFT.

Layers are dropped here by hand, from the lists of the Hugging Face model. Arms are written ``KIND-NUMBER``:

- ``first-3``: the first 3 layers stay;
- ``influence-3``: the 3 layers of the most block influence stay, after ShortGPT (arXiv 2403.03853): one minus the mean
  cosine between what a token is before a layer and behind it, over calibration batches;
- ``ffn-60``: FFN neurons go until 60 % of the block parameters are gone, as many in every layer, by `apt.compress`
  without repair;
- ``ffn-repaired-60``: the same with it.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

import apt
from apt.runs.config import RunConfig
from bench.rivals import FISHER, REPAIRED, calibration

LAYERS = {"bert": "bert.encoder.layer", "llama": "model.layers"}  # by model_type
BY_LAYERS, BY_WIDTH = ("first", "influence"), ("ffn", "ffn-repaired")
KINDS = (*BY_LAYERS, *BY_WIDTH)
_EVEN = ["pruning.unit_types=[neuron]", "pruning.layout=uniform"]


def parse(arm: str) -> tuple[str, int] | None:
    """Kind and number of such an arm; None for another."""
    kind, _, number = arm.rpartition("-")
    return (kind, int(number)) if kind in KINDS and number.isdigit() else None


def overrides(arm: str) -> list[str]:
    """Settings of the config that an arm implies."""
    found = parse(arm)
    assert found is not None
    kind, number = found
    if kind in BY_LAYERS:
        return ["pruning.target_sparsity=0", "pruning.num_events=0"]
    repair = REPAIRED if kind == "ffn-repaired" else FISHER
    return [*repair, *_EVEN, f"pruning.target_sparsity={number / 100}"]


def cut(arm: str, model: Any, config: RunConfig, data: Any) -> Any:
    """Cut a plain model as an arm says; the same object, plain.

    Args:
        arm: one that `parse` knows.
        model: in evaluation or training mode, which stays.
        config: with `overrides` of the arm; its calibration batches are those of `bench.rivals`.
        data: its training part.
    """
    found = parse(arm)
    assert found is not None
    kind, number = found
    if kind == "first":
        return keep_layers(model, range(number))
    if kind == "influence":
        scores = block_influence(model, calibration(config, data))
        return keep_layers(model, sorted(sorted(range(len(scores)), key=lambda layer: -scores[layer])[:number]))
    training = model.training
    batches = calibration(config, data, max(config.pruning.calibration_batches, config.pruning.moment_batches))
    apt.compress(model, batches, config.pruning.target_sparsity, config=config.apt_config())
    return apt.unpatch_model(model).train(training)


def layers_of(model: Any) -> nn.ModuleList:
    """The layers of a model, first to last. Raises ValueError where it is of no kind in `LAYERS`."""
    kind = model.config.model_type
    if kind not in LAYERS:
        raise ValueError(f"bench: layers are dropped from {' and '.join(LAYERS)} here, not from {kind}")
    found: nn.ModuleList = model.get_submodule(LAYERS[kind])
    return found


def keep_layers(model: Any, kept: Sequence[int]) -> Any:
    """Drop all layers but these, in place; the same object."""
    layers = layers_of(model)
    if not kept or not set(kept) <= set(range(len(layers))):
        raise ValueError(f"bench: {len(kept)} layers cannot stay of {len(layers)}; ask for 1 to {len(layers)}")
    staying = [layers[index] for index in kept]
    del layers[len(kept) :]
    for place, layer in enumerate(staying):
        layers[place] = layer
        for module in layer.modules():
            if hasattr(module, "layer_idx"):  # its place in the cache of keys and values
                module.layer_idx = place
    model.config.num_hidden_layers = len(kept)
    return model


@torch.no_grad()
def block_influence(model: Any, batches: Sequence[Mapping[str, Tensor]]) -> list[float]:
    """One minus the mean cosine between each token before a layer and behind it, layer by layer; without padding."""
    layers = layers_of(model)
    sums = [0.0] * len(layers)
    tokens = 0
    apart: dict[int, Tensor] = {}

    # By hooks: among the hidden states that the model gives, the last is behind the final norm.
    def looks_at(place: int) -> Any:
        def hook(_: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            apart[place] = 1.0 - cosine_similarity(given[0].float(), output.float(), dim=-1)  # [B, S]

        return hook

    training = model.training
    model.eval()
    with ExitStack() as stack:
        for place, layer in enumerate(layers):
            stack.callback(layer.register_forward_hook(looks_at(place)).remove)
        for batch in batches:
            model(**{name: value for name, value in batch.items() if name != "labels"})
            mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
            tokens += int(mask.sum())
            for place, values in apart.items():
                sums[place] += float((values * mask).sum())
    model.train(training)
    return [total / tokens for total in sums]
