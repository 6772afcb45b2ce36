"""Accuracy, training time and latency of full fine-tuning, PEFT LoRA and APT on one task, side by side.

``python -m bench.finetune [--config examples/demo.yaml] [--arms lora apt-60 apt-80 full] [--seeds 0 1 2]``

Every run is a process of its own with the same data, epochs, batches and seed; arms of one seed follow each other, so a
machine that drifts touches them alike. One CSV row a run; rows that are there already are skipped, so a comparison that
was stopped goes on. The Markdown table beside the CSV is drawn from the CSV alone. LoRA is PEFT's, with the modules,
the rank and alpha = rank * scale of the config; all arms train the pooler and the classifier too.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench.rows import append_row, environment, read_rows

FULL_LEARNING_RATE = 5e-5  # of full fine-tuning; the adapters' own is too high for it
COLUMNS = ("accuracy", "train_seconds", "sparsity", "speedup")


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
    evaluator = Evaluator(tokenizer, config.evaluation.inference_batch_size)
    row["accuracy"] = evaluator.evaluate(small, data.test)["accuracy"]
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


def table(rows: list[dict[str, str]]) -> str:
    """Means over the seeds with their spread; times are ratios to LoRA of the same seed, wall clock and CPU seconds."""
    lora = {(row["seed"], row["overrides"]): row for row in rows if row["arm"] == "lora"}
    lines = [
        "| arm | seeds | accuracy | over LoRA | sparsity | training, wall s | over LoRA | CPU s over LoRA | speed-up |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for arm, overrides in dict.fromkeys((row["arm"], row["overrides"]) for row in rows):
        mine = [row for row in rows if (row["arm"], row["overrides"]) == (arm, overrides)]
        paired = [row for row in mine if (row["seed"], overrides) in lora]
        values = {name: [float(row[name]) for row in mine] for name in COLUMNS}
        lines.append(
            f"| {arm} {overrides}".rstrip() + f" | {len(mine)} | {_spread(values['accuracy'], 4)} "
            f"| {_ratio_of_means(paired, lora, 'accuracy')} "
            f"| {_spread(values['sparsity'], 3)} | {_spread(values['train_seconds'], 0)} "
            f"| {_spread(_ratios(paired, lora, 'train_seconds'), 3)} "
            f"| {_spread(_ratios(paired, lora, 'train_cpu_seconds'), 3)} | {_spread(values['speedup'], 2)} |"
        )
    return "\n".join(lines) + "\n"


LoraRows = dict[tuple[str, str], dict[str, str]]  # by seed and overrides


def _ratios(rows: list[dict[str, str]], lora: LoraRows, name: str) -> list[float]:
    return [float(row[name]) / float(lora[row["seed"], row["overrides"]][name]) for row in rows]


def _ratio_of_means(rows: list[dict[str, str]], lora: LoraRows, name: str) -> str:
    if not rows:
        return ""
    theirs = statistics.mean(float(lora[row["seed"], row["overrides"]][name]) for row in rows)
    return f"{statistics.mean(float(row[name]) for row in rows) / theirs:.4f}"


def _spread(values: list[float], digits: int) -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("examples/demo.yaml"))
    parser.add_argument("--arms", nargs="+", default=["lora", "apt-60", "apt-80", "full"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("bench/results/cpu/finetune.csv"))
    parser.add_argument("--set", nargs="*", default=[], help="key=value overrides of the config, for every arm")
    parser.add_argument("--one", action="store_true", help="run one arm and seed here and print its row as JSON")
    arguments = parser.parse_args()
    if arguments.one:
        row = run(arguments.config, arguments.arms[0], arguments.seeds[0], arguments.set)
        print("ROW " + json.dumps(row), flush=True)
        return
    for seed in arguments.seeds:
        for arm in arguments.arms:
            done = {(row["arm"], row["seed"], row["overrides"]) for row in read_rows(arguments.out)}
            if (arm, str(seed), " ".join(arguments.set)) in done:
                continue
            command = [sys.executable, "-m", "bench.finetune", "--one", "--config", str(arguments.config)]
            command += ["--arms", arm, "--seeds", str(seed), "--set", *arguments.set]
            finished = subprocess.run(command, capture_output=True, text=True, check=False)
            found = [line[4:] for line in finished.stdout.splitlines() if line.startswith("ROW ")]
            if not found:
                raise SystemExit(f"{arm}, seed {seed} failed:\n{finished.stderr[-2000:]}")
            append_row(arguments.out, json.loads(found[0]))
            row = json.loads(found[0])
            print(f"{arm} seed {seed}: accuracy {row['accuracy']:.4f}, {row['train_seconds']} s", flush=True)
    text = table(read_rows(arguments.out))
    arguments.out.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
