"""Memory of the last phase alone: a fresh process that goes on after the last event, beside PEFT's LoRA from that step.

``python -m bench.last_phase [--config examples/demo.yaml] [--arms lora apt-60 ...]``

Each arm is trained in one process until all its events are over, and saved as a checkpoint; a process of its own
resumes there and trains to the end, on the same batches in every arm. Its peak is taken over `Trainer.train`, reading
the checkpoint included, less what was in use before: as in the other benchmarks. One CSV row an arm.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

import apt
from apt.apt_config import APTConfig
from apt.runs.config import load_config
from apt.runs.data import DatasetLoader
from apt.runs.models import build_model, build_tokenizer
from bench import plan
from bench.ablations import DISTILLED
from bench.memory import PeakMemory
from bench.rows import append_row, environment, read_rows
from bench.training import block_parameters, make_trainer, peft_lora

SHARE = 0.55  # of all steps, at which the processes change
LORA = "lora"
ARMS = {
    LORA: ["pruning.target_sparsity=0", "pruning.num_events=0"],
    "apt-60": ["pruning.target_sparsity=0.6"],
    "apt-80": ["pruning.target_sparsity=0.8"],
    "apt-60 with teacher": ["pruning.target_sparsity=0.6", *DISTILLED],
}


class Change(TrainerCallback):
    """Ends a run at `SHARE` of its steps, with a checkpoint; refuses one with an event from there on."""

    def __init__(self, config: APTConfig) -> None:
        self.config = config

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step = int(SHARE * state.max_steps)
        events = self.config.pruning.schedule(state.max_steps).events if self.config.prunes else []
        if events and events[-1] >= self.step:
            raise SystemExit(f"the last event is at step {events[-1]}: set pruning.prune_end below {SHARE}")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def train(config_path: Path, arm: str, seed: int, overrides: list[str], folder: Path) -> dict[str, Any]:
    """Train an arm up to the change of processes, or, where `folder` has its checkpoint, from there to the end.

    Returns:
        The row of that part.

    Raises:
        SystemExit: an event would come behind the change.
    """
    config = load_config(config_path, [*overrides, *ARMS[arm], f"training.seed={seed}"])
    tokenizer = build_tokenizer(config)
    data = DatasetLoader(config.data, tokenizer, seed)
    torch.manual_seed(seed)
    model = build_model(config, data.num_labels, tokenizer)
    total = block_parameters(model)
    trained = peft_lora(model, config) if arm == LORA else apt.patch_model(model, config.apt_config())
    checkpoint, change = get_last_checkpoint(str(folder)), Change(config.apt_config())
    trainer = make_trainer(trained, config, data, tokenizer, folder, change, ours=arm != LORA)
    with PeakMemory() as peak:
        trainer.train(resume_from_checkpoint=checkpoint)
    row: dict[str, Any] = {"what": "last_phase", "arm": arm, "seed": seed, "overrides": " ".join(overrides)}
    row |= {"from_step": change.step if checkpoint else 0, "to_step": trainer.state.global_step}
    row["sparsity"] = round(1.0 - block_parameters(trainer.model) / total, 4)
    row |= {"peak_mb": round(peak.mb, 1), "reserved_mb": round(peak.reserved_mb, 1)}
    return row | environment()


def in_two_processes(config_path: Path, arm: str, seed: int, overrides: list[str]) -> dict[str, Any]:
    """`train` up to the change, then in another process to the end: the row of the second."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "bench.last_phase", "--one", folder, "--config", str(config_path)]
        command += ["--arms", arm, "--seed", str(seed), "--set", *overrides]
        for _ in range(2):
            finished = subprocess.run(command, capture_output=True, text=True, check=False)
            found = [line[4:] for line in finished.stdout.splitlines() if line.startswith("ROW ")]
            if not found:
                raise SystemExit(f"{arm}, seed {seed} failed:\n{finished.stderr[-2000:]}")
    row: dict[str, Any] = json.loads(found[0])
    return row


def table(rows: list[dict[str, str]]) -> str:
    """The latest row of each arm; memory in MB, and over LoRA's."""
    latest = {(row["arm"], row["seed"], row["device"]): row for row in rows}
    header = ["arm", "seed", "steps", "sparsity", "peak MB", "over LoRA"]
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    for (arm, seed, device), row in latest.items():
        lora = latest.get((LORA, seed, device))
        cells = [arm, seed, f"{row['from_step']} to {row['to_step']}", f"{float(row['sparsity']):.3f}"]
        peak = float(row["peak_mb"])
        cells += [f"{peak:,.0f}", f"{peak / float(lora['peak_mb']):.3f}" if lora else "-"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("examples/demo.yaml"))
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", nargs="*", default=[], help="key=value overrides of the config, for every arm")
    parser.add_argument("--out", type=Path, default=plan.results("last_phase"))
    parser.add_argument(
        "--one", type=Path, help="do one part of the first arm here, with its checkpoint in this folder"
    )
    plan.add_options(parser)
    given = parser.parse_args()
    if given.one:
        print("ROW " + json.dumps(train(given.config, given.arms[0], given.seed, given.set, given.one)), flush=True)
        return
    units = [{"arm": arm, "seed": str(given.seed), "overrides": " ".join(given.set)} for arm in given.arms]
    for unit in plan.todo(units, given):
        row = in_two_processes(given.config, unit["arm"], given.seed, given.set)
        append_row(given.out, row)
        print(f"{unit['arm']}: {row['peak_mb']} MB", flush=True)
    text = table(read_rows(given.out))
    given.out.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
