"""Models that write: perplexity of held-out text, generated texts, and tokens per second of generation."""

import math
import statistics
import time
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from apt.families import IGNORED
from apt.process.progress import progress
from apt.runs.data import Examples, collate_blocks
from apt.training.clock import wait_for

WARM_UPS = 1  # generations before the clock runs


@torch.inference_mode()
def perplexity(model: nn.Module, data: Examples, batch_size: int = 8) -> dict[str, float]:
    """``exp`` of the mean negative log-likelihood of a token, over all tokens that have one before them in their block.

    Every token weighs the same, whatever batch or block it stands in; sums are kept in float64.

    Args:
        model: a causal language model, in evaluation mode.
        data: blocks, as `TextLoader` makes them.
        batch_size: blocks of one forward pass.

    Returns:
        `perplexity`, `loss` (its logarithm, nats a token) and `test_tokens`, the tokens predicted.
    """
    device = next(model.parameters()).device
    total = 0.0
    count = 0
    for start in progress(range(0, len(data), batch_size), "perplexity"):
        rows = [data[i] for i in range(start, min(start + batch_size, len(data)))]
        batch = {name: value.to(device) for name, value in collate_blocks(rows).items()}
        targets_BT = batch.pop("labels")[:, 1:]
        logits_BTV = model(**batch).logits[:, :-1].float()
        losses = nn.functional.cross_entropy(
            logits_BTV.flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORED, reduction="none"
        )
        total += float(losses.double().sum())
        count += int((targets_BT != IGNORED).sum())
    if not count:
        raise ValueError("perplexity: the held-out text has no token to predict; hold out more of it")
    loss = total / count
    return {"perplexity": math.exp(loss) if loss < 700.0 else math.inf, "loss": loss, "test_tokens": count}


@torch.inference_mode()
def generation_rates(
    models: Mapping[str, nn.Module], prompts: Tensor, *, new_tokens: int, repeats: int
) -> dict[str, list[float]]:
    """Tokens per second of greedy generation with a cache, of each model, taken in turns.

    Prompt and generation are timed together; no token ends a text early, so every model makes as many.

    Args:
        models: by name, in evaluation mode, all on one device.
        prompts: token ids ``[B, T]``.
        new_tokens: generated of each prompt.
        repeats: timed generations of each model.

    Returns:
        B * new_tokens / seconds of each repeat, by name; entries of one position were timed one after the other.
    """
    rates: dict[str, list[float]] = {name: [] for name in models}
    for repeat in progress(range(WARM_UPS + repeats), "timing generation", "turn"):
        for name, model in models.items():
            wait_for(prompts.device)
            started = time.perf_counter()
            greedy(model, prompts, new_tokens)
            wait_for(prompts.device)
            if repeat >= WARM_UPS:
                rates[name].append(prompts.shape[0] * new_tokens / (time.perf_counter() - started))
    return rates


@torch.inference_mode()
def greedy(model: nn.Module, prompts: Tensor, new_tokens: int) -> Tensor:
    """The `new_tokens` likeliest continuations of prompts ``[B, T]`` of equal length: ``[B, T + new_tokens]``."""
    generator: Any = model
    made: Tensor = generator.generate(
        prompts.to(next(model.parameters()).device),
        attention_mask=torch.ones_like(prompts),
        do_sample=False,
        use_cache=True,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
    )
    return made


@torch.inference_mode()
def generate(
    model: nn.Module, data: Examples, collator: Any, batch_size: int, max_new_tokens: int, num_beams: int = 1
) -> list[list[int]]:
    """What an encoder-decoder writes of each row, as token ids in the order of the data; longest rows are read first.

    Args:
        model: in evaluation mode.
        data: rows with `input_ids` and `attention_mask`.
        collator: pads them.
        batch_size: rows written at once.
        max_new_tokens: of each.
        num_beams: of the search; 1 is greedy.
    """
    order = sorted(range(len(data)), key=lambda i: -len(data.columns["input_ids"][i]))
    device = next(model.parameters()).device
    generator = cast(Any, model)
    made: list[list[int]] = [[] for _ in order]
    for start in progress(range(0, len(order), batch_size), "generation"):
        chosen = order[start : start + batch_size]
        rows = [{name: values for name, values in data[i].items() if name != "labels"} for i in chosen]
        batch = {name: value.to(device) for name, value in collator(rows).items() if value is not None}
        settings = {"do_sample": False, "use_cache": True, "num_beams": num_beams, "max_new_tokens": max_new_tokens}
        for i, ids in zip(chosen, generator.generate(**batch, **settings).tolist(), strict=True):
            made[i] = ids
    return made


def generation_metrics(
    dense: nn.Module, small: nn.Module, data: Examples, *, batch_size: int, length: int, new_tokens: int, repeats: int
) -> dict[str, Any]:
    """Medians of `generation_rates` for a dense and a small model, on prompts from held-out blocks."""
    rows = [data[i]["input_ids"][:length] for i in range(len(data)) if len(data[i]["input_ids"]) >= length]
    if not rows:
        raise ValueError(f"generation: no held-out block has {length} tokens; lower evaluation.inference_length")
    prompts = torch.tensor([rows[i % len(rows)] for i in range(batch_size)]).to(next(dense.parameters()).device)
    models = {"dense": dense, "small": small}
    rates = generation_rates(models, prompts, new_tokens=new_tokens, repeats=repeats)
    return {
        "generated_per_s_dense": statistics.median(rates["dense"]),
        "generated_per_s_small": statistics.median(rates["small"]),
        "generation_shape": [batch_size, prompts.shape[1], new_tokens],
    }
