"""What a run will need and gain: peak memory by phase and speed-ups, before it, without weights or data."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from apt.apt_config import APTConfig
from apt.process.progress import progress
from apt.runs.arguments import choose_device
from apt.runs.config import RunConfig
from apt.runs.estimate.dry_run import DryRun, PlannedEvent, build_on_meta, dry_run
from apt.runs.estimate.footprint import KINDS, Footprint, forward_flops
from apt.runs.estimate.repairing import repairing
from apt.runs.estimate.simulation import Simulation, batch_for
from apt.surgery import unpatch_model

# A process that has loaded what a run loads, and trained something small, since much is loaded at the first step.
BASELINE = """
import tempfile, warnings
warnings.simplefilter("ignore")
import torch, apt, apt.runs.run
for name in ("pandas", "sklearn.metrics", "scipy.stats"):
    try:
        __import__(name)
    except ImportError:
        pass
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments
sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=32)
model = apt.patch_model(BertForSequenceClassification(BertConfig(**sizes)))
rows = [{"input_ids": torch.ones(4, dtype=torch.long), "labels": torch.tensor(1)}] * 8
with tempfile.TemporaryDirectory() as folder:
    settings = dict(max_steps=20, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True)
    apt.APTrainer(model=model, args=TrainingArguments(folder, **settings), train_dataset=rows).train()
status = open("/proc/self/status").read()
print("VmRSS", int(status.split("VmRSS:")[1].split()[0]) * 1024)
"""


@dataclass(frozen=True)
class Estimate:
    """What `estimate` predicts."""

    plan: DryRun
    phases: dict[str, Footprint]  # of a training step, by phase of the run
    baseline: int | None  # bytes of the process before anything of the run is in it; None on a GPU: it is not counted
    measuring: int  # bytes of what lies side by side when the run is measured: trained, dense and small model
    step_speedup: float  # training step after the last event over one before the first
    inference_speedup: float  # of the dense model over the small one
    run_over_lora: float  # time of all training steps over that of LoRA
    batch: tuple[int, int]  # rows and tokens of a training step

    @property
    def training_peak(self) -> int:
        """Bytes at most while it trains."""
        return (self.baseline or 0) + max(phase.peak for phase in self.phases.values())

    @property
    def peak(self) -> int:
        """Bytes at most in the whole run."""
        return max(self.training_peak, (self.baseline or 0) + self.measuring)

    def __str__(self) -> str:
        names = list(self.phases)
        rows = [["MB", *names]]
        for kind in KINDS:
            sizes = [phase.bytes_of[kind] for phase in self.phases.values()]
            rows += [[kind, *(f"{size / 1e6:,.1f}" for size in sizes)]] if any(sizes) else []
        if self.baseline is not None:
            rows.append(["process, libraries", *[f"{self.baseline / 1e6:,.1f}"] * len(names)])
        rows.append(["peak", *(f"{((self.baseline or 0) + p.peak) / 1e6:,.1f}" for p in self.phases.values())])
        wide = [max(len(row[column]) for row in rows) for column in range(len(names) + 1)]
        lines = [f"{self.plan.model}, {self.plan.method}, {self.batch[0]} x {self.batch[1]} tokens a training step"]
        lines += [
            "  ".join([row[0].ljust(wide[0]), *(c.rjust(w) for c, w in zip(row[1:], wide[1:], strict=True))])
            for row in rows
        ]
        counted = "resident memory" if self.baseline is not None else "allocated on the GPU"
        lines.append(f"peak memory of the run    {self.peak / 1e6:,.0f} MB ({counted}), data set left out")
        if self.baseline is not None:
            lines.append(
                "  glibc keeps freed blocks and adds to it, unless MALLOC_MMAP_THRESHOLD_=65536 is in the environment"
            )
        lines.append(f"training step, faster     {self.step_speedup:.2f} times after the last event")
        lines.append(f"inference, faster         {self.inference_speedup:.2f} times")
        lines.append(f"training time over LoRA   {self.run_over_lora:.2f}")
        lines.append("speeds are ratios of FLOPs: as if all of the time went into matrix products of equal efficiency")
        return "\n".join(lines)


def estimate(config: RunConfig, *, baseline: bool = True) -> Estimate:
    """Peak memory and speed-ups of a run of this config. No weights are read, no data, and nothing is trained.

    Which units go is not known before: they are taken at random, heads and neurons alike for what they cost, ranks grow
    where such an importance says. A target of speed counts as the same saving in parameters. Sequences are as long as
    the config lets them be. A teacher teaches from the first event that prunes on.

    Args:
        config: of the run; `hardware.device` decides whether memory is that of the process or that of the GPU.
        baseline: False leaves out the measuring of what the process is before the run.

    Raises:
        ValueError: what `dry_run` says, or the model computes by the values of its input.
    """
    plan = dry_run(config)
    on_cpu = choose_device(config.hardware).type == "cpu"
    try:
        bar = progress((), "estimate", "step", total=_num_steps(config, plan))
        with FakeTensorMode(), torch.random.fork_rng(devices=[]), bar:
            predicted = _predict(config, plan, bar.update)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ValueError(
            f"estimate: {plan.model_type} computes by the values of its input ({error.func}), which are not known here"
        ) from None
    return Estimate(plan=plan, baseline=_baseline() if on_cpu and baseline else None, **predicted)


def _num_steps(config: RunConfig, plan: DryRun) -> int:
    """Training steps that `_predict` looks at, at most: at first, as masks fall, thrice taught, at last, LoRA's."""
    return 2 + 2 * bool(plan.events) + 3 * config.distillation.use_self_distillation


def _predict(config: RunConfig, plan: DryRun, after_step: Callable[[], object]) -> dict[str, Any]:
    """All that follows from shapes; `after_step` is called when one of the training steps has been looked at."""
    settings = config.apt_config()
    savings = [(event.step, saving) for event in plan.events if (saving := _saving(event)) is not None]
    simulation = partial(Simulation, config, plan=plan, after_step=after_step)
    start = simulation(settings)
    first = start.step()
    phases = {"before pruning": first}
    repairs = bool(savings) and settings.pruning.repair != "off"
    repair_flops = 0
    if repairs:
        phases["an event that repairs"] = repairing(start, first)
        repair_flops = phases["an event that repairs"].flops * len(savings)
    elif savings and savings[0][0] > 0:
        start.let_masks_fall()
        phases["masks fall"] = start.step()
    distillation = start.controller.distillation
    taught_flops = 0.0
    if distillation is not None:
        with_teacher = simulation(settings, taught=True)
        with_teacher.prune(savings[0][1])
        taught = with_teacher.step()
        phases["first with a teacher"] = taught
        steps = len(range(distillation.first, distillation.end, settings.distillation.distill_every))
        taught_flops = (taught.flops - with_teacher.step(taught=False).flops) * steps / plan.total_steps
    teacher_stays = distillation is not None and distillation.end >= plan.total_steps
    end = simulation(settings, taught=teacher_stays)
    if plan.events:
        if savings:
            end.prune(savings[-1][1])
        end.grow([event.rank_budget for event in plan.events if event.rank_budget is not None])
        phases["after the last event"] = end.step()
    last = list(phases.values())[-1]
    last_flops = end.step(taught=False).flops if teacher_stays else last.flops
    dense = build_on_meta(config, "cpu")
    small = unpatch_model(end.model)
    inference = batch_for(config, dense, config.evaluation.inference_batch_size, config.evaluation.inference_length)
    lora = simulation(_lora(settings)).step().flops
    side_by_side = sum(p.numel() * p.element_size() for model in (dense, small) for p in model.parameters())
    trained = sum(last.bytes_of[kind] for kind in ("weights", "adapters", "head", "moments"))
    return {
        "phases": phases,
        "measuring": side_by_side + trained,
        "step_speedup": first.flops / last.flops,
        "inference_speedup": forward_flops(dense, inference) / forward_flops(small, inference),
        "run_over_lora": (
            _mean_flops(plan, savings, first.flops, last_flops) + taught_flops + repair_flops / plan.total_steps
        )
        / lora,
        "batch": tuple(start.batch["input_ids"].shape),
    }


def _saving(event: PlannedEvent) -> float | None:
    """The fraction of the blocks that an event asks to be gone by then; None where only ranks grow."""
    return event.sparsity if event.speedup is None else 1.0 - 1.0 / event.speedup


def _lora(settings: APTConfig) -> APTConfig:
    """The same adapters under method "lora", and nothing else."""
    bare = APTConfig(method="lora", rank=settings.rank, scale=settings.scale)
    return replace(bare, target_modules=settings.target_modules) if not settings.prompts else bare


def _mean_flops(plan: DryRun, savings: list[tuple[int, float]], dense: int, last: int) -> float:
    """FLOPs of a step, on average: between the events they follow the sparsity in a straight line."""
    if not savings:
        return float(last)
    spent = 0.0
    flops = float(dense)
    before = 0
    for step, saving in savings:
        spent += flops * (step - before)
        share = saving / savings[-1][1] if savings[-1][1] else 0.0
        flops = dense + (last - dense) * share
        before = step
    spent += flops * (plan.total_steps - before)
    return spent / plan.total_steps


def _baseline() -> int:
    """Bytes of a process that has loaded what a run loads."""
    done = subprocess.run([sys.executable, "-c", BASELINE], capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("VmRSS")]
    if not lines:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise ValueError(f"estimate: the memory of a process cannot be measured here: {reason}")
    return int(lines[0].split()[1])
