"""Scores and efficiency: how good a model is, how fast it answers, and what each event saved."""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from apt.layers import adapted
from apt.layers.modes import evaluating
from apt.process.progress import progress
from apt.records import Event
from apt.runs.data import Examples
from apt.runs.evaluation.config import EvaluationConfig
from apt.surgery.event import apply_event, apply_plan
from apt.training.clock import medians_ms

SMALLEST_TIMED = 0.03  # fraction of the block parameters; what removes less is lost in the noise of a step


class Evaluator:
    """Runs a model over rows of data, and holds what scores depend on beside model and data.

    Args:
        tokenizer: of the model; it pads, and reads what is written.
        settings: of the scores; `inference_batch_size` rows make a forward pass.
    """

    def __init__(self, tokenizer: Any, settings: EvaluationConfig) -> None:
        from transformers import DataCollatorWithPadding

        self.tokenizer = tokenizer
        self.settings = settings
        self.batch_size = settings.inference_batch_size
        self.collator = DataCollatorWithPadding(tokenizer)

    def predict(self, model: nn.Module, data: Examples) -> tuple[NDArray[np.float32], NDArray[Any]]:
        """Logits ``[N, C]`` and labels ``[N]``, in the order of the data, on the device of the model.

        Batches are made of sentences of like length, so little is computed for padding.
        """
        # Longest first: what does not fit into memory fails at once.
        order = sorted(range(len(data)), key=lambda i: -len(data.columns["input_ids"][i]))
        device = next(model.parameters()).device
        chunks = []
        with evaluating(model), torch.inference_mode():
            for start in progress(range(0, len(order), self.batch_size), "evaluation"):
                batch = self.collator([data[i] for i in order[start : start + self.batch_size]])
                inputs = {name: value.to(device) for name, value in batch.items() if name != "labels"}
                chunks.append(model(**inputs).logits.float().cpu().numpy())
        logits = np.concatenate(chunks)
        logits[order] = logits.copy()
        return logits, np.asarray(data.columns["labels"])

    def answers(self, model: nn.Module, data: Examples) -> list[int]:
        """The likeliest class of every row, which needs no labels."""
        logits, _ = self.predict(model, Examples({**data.columns, "labels": [0] * len(data)}))
        classes: list[int] = logits.argmax(axis=-1).tolist()
        return classes


def latency_ms(
    models: Mapping[str, nn.Module], *, batch_size: int, length: int, vocab_size: int, repeats: int
) -> dict[str, float]:
    """Median time in ms of a forward pass of each model, taken in turns, so that a drifting machine touches all alike.

    Args:
        models: by name, all on one device.
        batch_size: sentences.
        length: tokens of each, in encoder and decoder; all are valid, and an encoder-decoder's end marks the last.
        vocab_size: token ids are drawn below it.
        repeats: timed passes of each model.
    """
    device = next(next(iter(models.values())).parameters()).device
    ids = torch.randint(vocab_size, (batch_size, length), generator=torch.Generator().manual_seed(0)).to(device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    config: Any = getattr(next(iter(models.values())), "config", None)
    if getattr(config, "is_encoder_decoder", False):
        end = config.eos_token_id  # a classifier reads there, once a sentence
        if end is not None:
            ids.masked_fill_(ids == end, end + 1 if end + 1 < vocab_size else 0)[:, -1] = end
        batch["decoder_input_ids"] = ids

    def forward(model: nn.Module) -> Callable[[], object]:
        return lambda: model(**batch)

    with evaluating(*models.values()), torch.inference_mode():
        return medians_ms({name: forward(model) for name, model in models.items()}, repeats, device, "timing answers")


def time_events(
    make_model: Callable[[], nn.Module], events: Iterable[Event], batch: Mapping[str, Tensor], steps: int
) -> list[dict[str, Any]]:
    """What each event saves: forward and backward on one batch before it, pruned by it, and grown too; in turns.

    The events are replayed one after the other; those that remove less than 3 % of the block parameters are not timed.
    Pruning is timed apart from the growth of ranks, which spends on purpose part of what pruning saves.

    Args:
        make_model: a freshly patched model, as the run began with.
        events: of the run, in order.
        batch: inputs and labels, on the device of that model.
        steps: timed passes of each model; their median counts.

    Returns:
        Rows of step, removed (a fraction), ms_before, ms_pruned (ranks as before), ms_after (the whole event),
        ratio_pruned and ratio (ms_before over each: above 1 is faster), and under the same three endings saved_mb (what
        one step keeps for backward, in MB, parameters not counted) and live_mb (live parameters, adapters too).
    """
    model = make_model().train()
    device = next(model.parameters()).device
    rows = []
    for event in progress(events, "timing events", "event"):
        timed = event.removed >= SMALLEST_TIMED
        models = {"before": copy.deepcopy(model)} if timed else {}
        if event.prune is not None:
            apply_plan(model, event.prune)
        models |= {"pruned": copy.deepcopy(model)} if timed else {}
        apply_event(model, replace(event, prune=None))
        if timed:
            models |= {"after": model}
            times = medians_ms({name: _step(each, batch) for name, each in models.items()}, steps, device)
            rows.append(
                {
                    "step": event.step,
                    "removed": event.removed,
                    **{f"ms_{name}": ms for name, ms in times.items()},
                    **{f"saved_mb_{name}": saved_bytes(each, batch) / 1e6 for name, each in models.items()},
                    **{f"live_mb_{name}": live_bytes(each) / 1e6 for name, each in models.items()},
                    "ratio_pruned": times["before"] / times["pruned"],
                    "ratio": times["before"] / times["after"],
                }
            )
    return rows


def saved_bytes(model: nn.Module, batch: Mapping[str, Tensor]) -> int:
    """Bytes that autograd keeps from the forward pass of one batch for its backward pass.

    Each storage counts once, whatever views of it are kept, and those of parameters and buffers do not count: they are
    there anyway.
    """
    held = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), *batch.values())}
    sizes: dict[int, int] = {}
    kept: list[Tensor] = []  # alive until the count is done, so that no address comes twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            sizes[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**batch)
    return sum(sizes.values())


def live_bytes(model: nn.Module) -> int:
    """Bytes of the parameters that a step computes with: what a pruned layer keeps behind its view does not count."""
    tails = sum(
        (tensor.numel() - view.numel()) * tensor.element_size()
        for _, module in adapted(model)
        for tensor, view in zip((module.weight, module.bias), module.view(), strict=True)
        if tensor is not None and view is not None
    )
    return sum(p.numel() * p.element_size() for p in model.parameters()) - tails


def _step(model: nn.Module, batch: Mapping[str, Tensor]) -> Callable[[], None]:
    def run() -> None:
        model.zero_grad(set_to_none=True)
        model(**batch).loss.backward()

    return run
