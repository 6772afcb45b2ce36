"""One arm of a comparison, trained on the task of a config and measured.

``python -m bench.arms ARM SEED --config FILE [--set KEY=VALUE ...]`` prints its row as JSON; `run_apart` calls it, so
that each run is a process of its own. Arms: full fine-tuning, PEFT's LoRA, APT, PEFT's LoRA behind a cut of
`bench.plain_cuts`, and the rivals of `bench.rivals`, which begin where LoRA of the same seed ended: it is trained first
where bench/scratch has none of the same settings.
"""

import argparse
import hashlib
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.apart import row_of
from bench.rows import environment

FULL_LEARNING_RATE = 5e-5  # of full fine-tuning; the adapters' own is too high for it
SCRATCH = Path("bench/scratch/arms")
KEPT, ROW = "model", "row.json"


def run_apart(
    config_path: Path, arm: str, seed: int, overrides: list[str], points: int = 0, keep: Path | None = None
) -> dict[str, Any]:
    """`run` in a process of its own; `run_seconds` is how long all of it took.

    Raises:
        SystemExit: it failed; its last words are the message.
    """
    command = ["bench.arms", arm, str(seed), "--config", str(config_path)]
    command += ["--points", str(points), "--set", *overrides]
    command += ["--keep", str(keep)] if keep else []
    started = time.perf_counter()
    row = row_of(command, f"{arm}, seed {seed}")
    return row | {"run_seconds": round(time.perf_counter() - started, 1)}


def run(
    config_path: Path, arm: str, seed: int, overrides: list[str], points: int = 0, keep: Path | None = None
) -> dict[str, Any]:
    """Train one arm and measure it.

    Args:
        config_path: model, data and settings.
        arm: "full", "lora", "apt-PERCENT", one of `bench.rivals.KINDS` with "-PERCENT", or one of `bench.plain_cuts`.
        seed: of the adapters, the head, the order of the data.
        overrides: ``key=value`` on top of the config.
        points: of the course that column `course` holds: seconds of training, accuracy, sparsity.
        keep: folder in which LoRA leaves its model for the rivals; theirs is `SCRATCH`.
    """
    from apt.runs.config import load_config
    from apt.runs.data import DatasetLoader
    from apt.runs.evaluation.evaluate import Evaluator, latency_ms
    from apt.runs.models import build_model, build_tokenizer
    from bench.rivals import KINDS
    from bench.training import Course, block_parameters

    kind, implied = settings_of(arm)
    config = load_config(config_path, [*overrides, f"training.seed={seed}", *implied])
    tokenizer = build_tokenizer(config)
    data = DatasetLoader(config.data, tokenizer, config.training.seed)
    torch.manual_seed(seed)  # of the adapters; the new head has the same seed in every arm
    dense = build_model(config, data.num_labels, tokenizer).eval()
    evaluator = Evaluator(tokenizer, config.evaluation)
    course = Course(evaluator, data.test, points, block_parameters(dense))
    if kind in KINDS:
        small, row = _retrained(kind, config_path, overrides, config, data, tokenizer, course)
    else:
        model = build_model(config, data.num_labels, tokenizer)
        small, row = _trained(kind, arm, model, config, data, tokenizer, course)
        row |= {"course": course.column()} if points else {}
    row["sparsity"] = round(1.0 - block_parameters(small) / course.total, 4)
    logits, labels = evaluator.predict(small, data.test)
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
    row = {"arm": arm, "seed": seed} | row | setting | environment()
    if keep:
        small.save_pretrained(keep / KEPT)
        (keep / ROW).write_text(json.dumps(row), encoding="utf-8")
    return row


def settings_of(arm: str) -> tuple[str, list[str]]:
    """The kind of an arm, and what it sets in the config; SystemExit where there is no such arm."""
    from bench import plain_cuts
    from bench.rivals import CUT_AT_ONCE, KINDS

    if found := plain_cuts.parse(arm):
        return found[0], plain_cuts.overrides(arm)
    kind, _, percent = arm.rpartition("-") if arm[-1].isdigit() else (arm, "", "0")
    if kind not in ("full", "lora", "apt", *KINDS):
        known = ["full", "lora", "apt-60", *(f"{kind}-60" for kind in (*KINDS, *plain_cuts.BY_WIDTH))]
        known += [f"{kind}-3" for kind in plain_cuts.BY_LAYERS]
        raise SystemExit(f"no arm is called {arm!r}; there are {', '.join(known)}")
    sparsity = float(percent) / 100
    chosen = [f"pruning.target_sparsity={sparsity}", *(CUT_AT_ONCE if kind == "prune" else [])]
    if not sparsity:
        chosen.append("pruning.num_events=0")
    if kind == "full":
        chosen.append(f"training.learning_rate={FULL_LEARNING_RATE}")
    return kind, chosen


def _trained(
    kind: str, arm: str, model: Any, config: Any, data: Any, tokenizer: Any, course: Any
) -> tuple[Any, dict[str, Any]]:
    """The model as it would be deployed (adapters merged, shrunk), and what training cost."""
    import apt
    from bench import plain_cuts
    from bench.training import peft_lora, train

    if kind == "full":
        return _deployed(*train(model, config, data, tokenizer, course))
    if kind in plain_cuts.KINDS:
        course.start()  # the cut is part of training
        plain_cuts.cut(arm, model, config, data)
    if kind == "lora" or kind in plain_cuts.KINDS:
        return _deployed(*train(peft_lora(model, config), config, data, tokenizer, course))
    return _deployed(*train(apt.patch_model(model, config.apt_config()), config, data, tokenizer, course, ours=True))


def _deployed(trainer: Any, row: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """What a finished trainer leaves for use, and columns about it."""
    import apt

    model = trainer.model
    if hasattr(model, "merge_and_unload"):
        return model.merge_and_unload().eval(), row
    if not isinstance(trainer, apt.APTrainer):
        return model.eval(), row
    counts = apt.summary(model)
    row["heads"], row["neurons"] = " ".join(map(str, counts.heads)), " ".join(map(str, counts.neurons))
    row["events"] = " ".join(str(event.step) for event in trainer.controller.events)
    row["ranks"] = sum(counts.ranks.values())
    row |= {key: round(value, 1) for key, value in trainer.throughput().items() if value is not None}
    with tempfile.TemporaryDirectory() as folder:
        apt.export_model(model, Path(folder) / "model")
        return apt.load_model(Path(folder) / "model").eval(), row


def _retrained(
    kind: str, config_path: Path, overrides: list[str], config: Any, data: Any, tokenizer: Any, course: Any
) -> tuple[Any, dict[str, Any]]:
    """A rival; what the LoRA before it cost is added, memory is that of the phase that took more."""
    from apt.runs.models import build_model
    from bench.rivals import cut_and_retrain

    seed = config.training.seed
    folder = kept_lora(config_path, seed, overrides)
    if not (folder / ROW).exists():
        run_apart(config_path, "lora", seed, overrides, course.points, folder)
    first = json.loads((folder / ROW).read_text(encoding="utf-8"))
    start = replace(config, model=replace(config.model, name=str(folder / KEPT)))
    model = build_model(start, data.num_labels, tokenizer)
    small, row = _deployed(*cut_and_retrain(kind, model, config, data, tokenizer, course))
    row |= {"course": course.column(before=first["train_seconds"])} if course.points else {}
    row["retrain_seconds"] = row["train_seconds"]
    for name in ("train_seconds", "train_cpu_seconds", "steps"):
        row[name] = round(row[name] + first[name], 2)
    return small, row | {"peak_mb": max(row["peak_mb"], first["peak_mb"])}


def kept_lora(config_path: Path, seed: int, overrides: list[str]) -> Path:
    """Where LoRA of these settings leaves its model for the rivals."""
    settings = [config_path.read_text(encoding="utf-8"), *overrides, str(seed), torch.__version__]
    return SCRATCH / hashlib.sha256("\n".join(settings).encode()).hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("arm", help="full, lora, apt-PERCENT, prune-PERCENT, first-LAYERS, ...; see bench.plain_cuts")
    parser.add_argument("seed", type=int)
    parser.add_argument("--config", type=Path, default=Path("examples/demo.yaml"))
    parser.add_argument("--points", type=int, default=0, help="at which accuracy is measured during training")
    parser.add_argument("--keep", type=Path, help="folder in which the model is left")
    parser.add_argument("--set", nargs="*", default=[], help="key=value overrides of the config")
    options = parser.parse_args()
    row = run(options.config, options.arm, options.seed, options.set, options.points, options.keep)
    print("ROW " + json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
