"""One training step of `patch_model(method="lora")` against PEFT's LoRA: ``python -m bench.lora_step [--out FILE]``.

Random weights, three shapes, fp32, adapters on q and v and for encoders on the FFN; forward, backward and AdamW step.
Outputs are compared before anything is timed; steps of the two are interleaved.
"""

import argparse
import copy
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

import apt
from bench.plan import results
from bench.rows import append_row, environment, quantiles

# name: (model class, config, targets, batch, length)
SHAPES: dict[str, tuple[Any, Any, list[str], int, int]] = {
    "minilm": (
        BertForSequenceClassification,
        BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536),
        ["query", "value", "intermediate.dense", "output.dense"],
        32,
        48,
    ),
    "bert-base, 3 layers": (
        BertForSequenceClassification,
        BertConfig(hidden_size=768, num_hidden_layers=3, num_attention_heads=12, intermediate_size=3072),
        ["query", "value", "intermediate.dense"],
        16,
        64,
    ),
    "llama 576, 4 layers": (
        LlamaForSequenceClassification,
        LlamaConfig(
            hidden_size=576,
            num_hidden_layers=4,
            num_attention_heads=9,
            num_key_value_heads=3,
            intermediate_size=1536,
            vocab_size=8192,
            pad_token_id=0,
        ),
        ["q_proj", "v_proj"],
        8,
        128,
    ),
}


def peft_lora(model: nn.Module, targets: list[str]) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    saved = [
        name for name in ("pooler", "classifier", "score") if any(n.endswith(name) for n, _ in model.named_modules())
    ]
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets, modules_to_save=saved))


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Any]) -> float:
    started = time.perf_counter()
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - started) * 1e3


def compare(name: str, steps: int) -> dict[str, Any]:
    """Median step times in ms of both, and their ratio, ours over PEFT's."""
    build, config, targets, batch_size, length = SHAPES[name]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    plain = build(config)
    models = {
        "apt": apt.patch_model(copy.deepcopy(plain), method="lora", target_modules=targets),
        "peft": peft_lora(copy.deepcopy(plain), targets),
    }
    ids = torch.randint(1, config.vocab_size, (batch_size, length), device=device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2}
    models = {key: model.to(device).eval() for key, model in models.items()}
    with torch.no_grad():
        apart = (models["apt"](**batch).logits - models["peft"](**batch).logits).abs().max().item()
    if apart > 1e-4:
        raise RuntimeError(f"{name}: the two differ by {apart:.1e} before the first step, so their times mean nothing")
    trained = {key: sum(p.numel() for p in m.parameters() if p.requires_grad) for key, m in models.items()}
    assert trained["apt"] == trained["peft"], f"{name}: the two train different parameters, {trained}"
    optimizers = {
        key: torch.optim.AdamW([p for p in model.train().parameters() if p.requires_grad], lr=1e-3)
        for key, model in models.items()
    }
    times: dict[str, list[float]] = {"apt": [], "peft": []}
    for step in range(steps + 3):
        for key in ("apt", "peft") if step % 2 else ("peft", "apt"):
            ms = one_step(models[key], optimizers[key], batch)
            if step >= 3:
                times[key].append(ms)
    row: dict[str, Any] = {"what": "train_step", "shape": name, "dtype": "fp32", "trainable": trained["apt"]}
    for key, values in times.items():
        row[f"{key}_ms_p20"], row[f"{key}_ms_p50"], row[f"{key}_ms_p80"] = (round(v, 3) for v in quantiles(values))
    ratios = [ours / theirs for ours, theirs in zip(times["apt"], times["peft"], strict=True)]
    row["ratio_p50"] = round(quantiles(ratios)[1], 4)
    return row | {"steps": steps} | environment()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path, default=results("lora_step"))
    arguments = parser.parse_args()
    for name in SHAPES:
        row = compare(name, arguments.steps)
        append_row(arguments.out, row)
        print(
            f"{name}: {row['apt_ms_p50']} ms against PEFT's {row['peft_ms_p50']} ms, ratio {row['ratio_p50']}",
            flush=True,
        )


if __name__ == "__main__":
    main()
