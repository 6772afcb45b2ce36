"""One arm of a comparison: full fine-tuning, PEFT's LoRA or APT, trained on the task of a config and measured.

``python -m bench.arms ARM SEED --config FILE [--set KEY=VALUE ...]`` prints its row as JSON; `run_apart` calls it, so
that each run is a process of its own.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.rows import environment

FULL_LEARNING_RATE = 5e-5  # of full fine-tuning; the adapters' own is too high for it


def run_apart(config_path: Path, arm: str, seed: int, overrides: list[str]) -> dict[str, Any]:
    """`run` in a process of its own.

    Raises:
        SystemExit: it failed; its last words are the message.
    """
    command = [sys.executable, "-m", "bench.arms", arm, str(seed), "--config", str(config_path), "--set", *overrides]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    found = [line[4:] for line in finished.stdout.splitlines() if line.startswith("ROW ")]
    if not found:
        raise SystemExit(f"{arm}, seed {seed} failed:\n{finished.stderr[-2000:]}")
    row: dict[str, Any] = json.loads(found[0])
    return row


def run(config_path: Path, arm: str, seed: int, overrides: list[str]) -> dict[str, Any]:
    """Train one arm and measure it. An arm is "full", "lora" or "apt-PERCENT"."""
    from apt.config import load_config
    from apt.data import DatasetLoader
    from apt.evaluate import Evaluator, latency_ms
    from apt.tasks import build_model, build_tokenizer

    sparsity = float(arm[4:]) / 100 if arm.startswith("apt-") else 0.0
    chosen = [*overrides, f"training.seed={seed}", f"pruning.target_sparsity={sparsity}"]
    if not sparsity:
        chosen.append("pruning.num_events=0")
    if arm == "full":
        chosen.append(f"training.learning_rate={FULL_LEARNING_RATE}")
    config = load_config(config_path, chosen)
    tokenizer = build_tokenizer(config)
    data = DatasetLoader(config.data, tokenizer, config.training.seed)
    torch.manual_seed(seed)  # of the adapters; the new head has the same seed in every arm
    model = build_model(config, data.num_labels, tokenizer)
    dense = build_model(config, data.num_labels, tokenizer).eval()
    small, row = _train(arm, model, config, data, tokenizer)
    logits, labels = Evaluator(tokenizer, config.evaluation.inference_batch_size).predict(small, data.test)
    correct = logits.argmax(-1) == labels
    row["accuracy"] = float(correct.mean())
    row["correct"] = np.packbits(correct).tobytes().hex()  # sentence by sentence, for paired tests
    times = latency_ms(
        {"dense": dense, "small": small},
        batch_size=config.evaluation.inference_batch_size,
        length=config.evaluation.inference_length,
        vocab_size=dense.config.vocab_size,
        repeats=config.evaluation.inference_repeats,
    )
    row["latency_ms_dense"], row["latency_ms_small"] = round(times["dense"], 3), round(times["small"], 3)
    row["speedup"] = round(times["dense"] / times["small"], 3)
    row["params"] = sum(p.numel() for p in small.parameters())
    setting = {"epochs": config.training.epochs, "test_size": len(data.test), "overrides": " ".join(overrides)}
    return {"arm": arm, "seed": seed} | row | setting | environment()


def _train(arm: str, model: Any, config: Any, data: Any, tokenizer: Any) -> tuple[Any, dict[str, Any]]:
    """The trained model as it would be deployed (adapters merged, shrunk), and what training cost."""
    import tempfile

    from transformers import DataCollatorWithPadding, Trainer

    import apt
    from apt.tasks import training_arguments

    with tempfile.TemporaryDirectory() as folder:
        common = {"args": training_arguments(config, Path(folder)), "train_dataset": data.train}
        common["data_collator"] = DataCollatorWithPadding(tokenizer)
        if arm == "full":
            trainer = Trainer(model=model, **common)
        elif arm == "lora":
            model = peft_lora(model, config)
            trainer = Trainer(model=model, **common)
        else:
            model = apt.patch_model(model, config.apt_config())
            trainer = apt.APTrainer(model=model, **common)
        row: dict[str, Any] = {"trainable_start": sum(p.numel() for p in model.parameters() if p.requires_grad)}
        started, cpu = time.perf_counter(), time.process_time()
        trainer.train()
        row["train_seconds"] = round(time.perf_counter() - started, 2)
        row["train_cpu_seconds"] = round(time.process_time() - cpu, 2)
        row["steps"] = trainer.state.global_step
        row["sparsity"] = 0.0
        if arm == "lora":
            model = model.merge_and_unload()
        elif arm.startswith("apt-"):
            counts = apt.summary(model)
            row["sparsity"] = round(counts.sparsity, 4)
            row["heads"], row["neurons"] = " ".join(map(str, counts.heads)), " ".join(map(str, counts.neurons))
            row["events"] = " ".join(str(event.step) for event in trainer.controller.events)
            row["ranks"] = sum(counts.ranks.values())
            row |= {key: round(value, 1) for key, value in trainer.throughput().items()}
            apt.export_model(model, Path(folder) / "model")
            model = apt.load_model(Path(folder) / "model")
    return model.eval(), row


def peft_lora(model: Any, config: Any) -> Any:
    """PEFT's LoRA on the modules that the config's targets name, with the same rank and scale."""
    import copy

    from peft import LoraConfig, get_peft_model

    import apt

    twin = apt.patch_model(copy.deepcopy(model), config.apt_config(), method="lora")
    trained = [
        name for name in ("pooler", "classifier", "score") if any(n.endswith(name) for n, _ in model.named_modules())
    ]
    return get_peft_model(
        model,
        LoraConfig(
            r=config.training.initial_rank,
            lora_alpha=config.training.initial_rank * config.training.scaling_factor,
            target_modules=list(apt.summary(twin).ranks),
            modules_to_save=trained,
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("arm", help="full, lora or apt-PERCENT")
    parser.add_argument("seed", type=int)
    parser.add_argument("--config", type=Path, default=Path("examples/demo.yaml"))
    parser.add_argument("--set", nargs="*", default=[], help="key=value overrides of the config")
    arguments = parser.parse_args()
    print("ROW " + json.dumps(run(arguments.config, arguments.arm, arguments.seed, arguments.set)), flush=True)


if __name__ == "__main__":
    main()
