"""One adapter method, ours or PEFT's, trained on the task of a config.

``python -m bench.adapter_arms ARM SEED --config FILE [--set KEY=VALUE ...]`` prints its row as JSON; `bench.adapters`
calls it, so that each row comes from a process of its own. `bench.adapter_steps` has the same arms at a known shape.
"""

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import apt
from bench.contestants import linear_names
from bench.rows import environment
from bench.training import Course, block_parameters, train

RANK, SCALE, TOKENS, MLP = 8, 2.0, 20, 512  # of all adapters; of all prompts, and P-tuning's network
FIRST_RANK = 12  # of AdaLoRA, which ends at RANK
GATES_AND_PROMPTS = 1e-2  # learning rate of what starts small or has few numbers; adapters have the config's
HEADS = ("pooler", "classifier", "score")  # train in full in every arm, as in ours
OWN = (
    "adapter.",
    "prompt.",
    "pruning.",
    "tuning.",
    "distillation.",
    "training.initial_rank",
    "training.scaling_factor",
)
OWN += ("model.method", "model.prune", "ablation")  # what no override may change


@dataclass(frozen=True)
class Arm:
    """A method, by whom it is computed, and what it needs other than the config's settings."""

    method: str
    peft: bool = False
    learning_rate: float | None = None


ARMS = {
    "lora": Arm("lora"),
    "adalora": Arm("adalora"),
    "adalora_simple": Arm("adalora_simple"),
    "gsa": Arm("gsa", learning_rate=GATES_AND_PROMPTS),
    "dynacsg": Arm("dynacsg"),
    "spectral_a": Arm("spectral_a"),
    "spectral_r": Arm("spectral_r"),
    "p_tuning": Arm("p_tuning", learning_rate=GATES_AND_PROMPTS),
    "prefix_tuning": Arm("prefix_tuning", learning_rate=GATES_AND_PROMPTS),
    "peft lora": Arm("lora", peft=True),
    "peft adalora": Arm("adalora", peft=True),
    "peft p_tuning": Arm("p_tuning", peft=True, learning_rate=GATES_AND_PROMPTS),
    "peft prefix_tuning": Arm("prefix_tuning", peft=True, learning_rate=GATES_AND_PROMPTS),
}
PROMPTS = ("p_tuning", "prefix_tuning")
BASELINE = "peft lora"


def settings(arm: Arm, total_steps: int, targets: tuple[str, ...] | None) -> dict[str, Any]:
    """What `apt.patch_model` is given, beside the method."""
    if arm.method == "p_tuning":
        return {"num_virtual_tokens": TOKENS, "hidden_dimension": MLP, "mlp_layers": 3, "layer_norm": False}
    if arm.method == "prefix_tuning":
        return {"num_virtual_tokens": TOKENS}
    chosen: dict[str, Any] = {"rank": RANK, "scale": SCALE, "target_modules": targets}
    return chosen | ({"rank": FIRST_RANK, **budget(total_steps)} if arm.method == "adalora" else {})


def budget(total_steps: int) -> dict[str, int]:
    """AdaLoRA's schedule: full for a tenth of the run, final for the last three tenths."""
    times = {"tinit": total_steps // 10, "tfinal": 3 * total_steps // 10, "deltaT": max(1, total_steps // 50)}
    return {"target_r": RANK, **times}


def peft_model(method: str, model: Any, names: list[str], total_steps: int) -> Any:
    """PEFT's model of a method, with the numbers of `settings`; pooler and classifier train too."""
    from peft import AdaLoraConfig, LoraConfig, PrefixTuningConfig, PromptEncoderConfig, get_peft_model

    heads = [end for end in HEADS if any(name.endswith(end) for name, _ in model.named_modules())]
    config: Any
    if method == "lora":
        config = LoraConfig(r=RANK, lora_alpha=RANK * SCALE, target_modules=names, modules_to_save=heads)
    elif method == "adalora":
        config = AdaLoraConfig(
            init_r=FIRST_RANK,
            lora_alpha=FIRST_RANK * SCALE,
            target_modules=names,
            modules_to_save=heads,
            total_step=total_steps,
            task_type="SEQ_CLS",  # without it PEFT goes past the forward that adds the orthogonality penalty
            **budget(total_steps),
        )
    elif method == "p_tuning":
        prompt = {"num_virtual_tokens": TOKENS, "task_type": "SEQ_CLS", "modules_to_save": heads}
        config = PromptEncoderConfig(encoder_hidden_size=MLP, **prompt)
    else:
        config = PrefixTuningConfig(num_virtual_tokens=TOKENS, task_type="SEQ_CLS", modules_to_save=heads)
    return get_peft_model(model, config)


class Allocating(Course):
    """Calls what PEFT's AdaLoRA must be called with after every step, before gradients are gone."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model.base_model.update_and_allocate(state.global_step + 1)


def run(config_path: Path, name: str, seed: int, overrides: list[str]) -> dict[str, Any]:
    """Train an arm on the task of a config and measure it."""
    from apt.runs.config import load_config
    from apt.runs.data import DatasetLoader
    from apt.runs.evaluation.evaluate import Evaluator
    from apt.runs.models import build_model, build_tokenizer

    arm = ARMS[name]
    fixed = [override for override in overrides if override.startswith(OWN)]
    if fixed:
        raise SystemExit(f"settings of the methods are those of bench/adapter_arms.py, for PEFT too: leave out {fixed}")
    chosen = [*overrides, f"training.seed={seed}", "pruning.target_sparsity=0", "pruning.num_events=0"]
    if arm.learning_rate is not None:
        chosen.append(f"training.learning_rate={arm.learning_rate}")
    config = load_config(config_path, chosen)
    tokenizer = build_tokenizer(config)
    data = DatasetLoader(config.data, tokenizer, config.training.seed)
    rounds = -(-len(data.train) // (config.training.batch_size * config.training.gradient_accumulation_steps))
    steps = config.training.max_steps if config.training.max_steps > 0 else int(config.training.epochs * rounds)
    model = build_model(config, data.num_labels, tokenizer)
    torch.manual_seed(seed)  # of the adapters; the new head has the same seed in every arm
    targets = config.apt_config().target_modules
    assert not isinstance(targets, str)
    total = block_parameters(model)
    model = prepared(arm, model, steps, targets)
    evaluator = Evaluator(tokenizer, config.evaluation)
    kind = Allocating if (arm.method, arm.peft) == ("adalora", True) else Course
    trainer, row = train(model, config, data, tokenizer, kind(evaluator, data.test, 0, total), ours=not arm.peft)
    logits, labels = evaluator.predict(trainer.model, data.test)
    correct = logits.argmax(-1) == labels
    row |= {"accuracy": float(correct.mean()), "correct": np.packbits(correct).tobytes().hex()}
    row |= {"file_bytes": file_bytes(trainer.model, arm), "learning_rate": config.training.learning_rate}
    row["trainable"] = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    if not arm.peft:
        counts = apt.summary(trainer.model)
        row |= {"ranks": sum(counts.ranks.values()), "active": sum(counts.active.values())}
        row["init_seconds"] = round(counts.init_seconds, 2)
    row |= {"test_size": len(data.test), "overrides": " ".join(overrides)}
    return {"arm": name, "seed": seed, "shape": ""} | row | environment()


def prepared(arm: Arm, model: nn.Module, steps: int, targets: tuple[str, ...] | None) -> Any:
    """The model of an arm, ready to train."""
    if arm.peft:
        return peft_model(arm.method, model, [] if arm.method in PROMPTS else linear_names(model, targets), steps)
    return apt.patch_model(model, method=arm.method, target_sparsity=0.0, num_events=0, **settings(arm, steps, targets))


def file_bytes(model: Any, arm: Arm) -> int:
    """Size of the file that holds what was trained."""
    with tempfile.TemporaryDirectory() as folder:
        if not arm.peft:
            path = apt.EfficientFineTuningManager(model).save_efficient_weights(Path(folder) / "weights.safetensors")
            return path.stat().st_size
        model.save_pretrained(folder)
        return sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("arm", choices=list(ARMS))
    parser.add_argument("seed", type=int)
    parser.add_argument("--config", type=Path, default=Path("examples/demo.yaml"))
    parser.add_argument("--set", nargs="*", default=[], help="key=value overrides of the config")
    options = parser.parse_args()
    print("ROW " + json.dumps(run(options.config, options.arm, options.seed, options.set)), flush=True)


if __name__ == "__main__":
    main()
