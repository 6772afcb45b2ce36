"""What a run will need and gain: peak memory by phase and speed-ups, before it, without weights or data."""

import subprocess
import sys
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    unset_fake_temporarily,
)

from apt.adapters import adapted
from apt.config import RunConfig
from apt.controller import APTConfig, Controller, Distillation, patch_state
from apt.dry_run import DryRun, PlannedEvent, build_on_meta, dry_run
from apt.footprint import KINDS, Footprint, forward_flops, measure_step
from apt.moments import OPTIMIZERS
from apt.patch import patch_model, unpatch_model
from apt.pruner import UnitSearch
from apt.surgery import apply_prune_plan, apply_rank_plan
from apt.tasks import OF_TOKENS, choose_device, positions
from apt.tuner import adapter_sizes, plan_ranks
from apt.units import block_params

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
# A process that has loaded what a run loads, and trained something small, since much is loaded at the first step.
BASELINE = """
import tempfile, warnings
warnings.simplefilter("ignore")
import torch, apt, apt.run
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
    the config lets them be.

    Args:
        config: of the run; `hardware.device` decides whether memory is that of the process or that of the GPU.
        baseline: False leaves out the measuring of what the process is before the run.

    Raises:
        ValueError: what `dry_run` says, or the model computes by the values of its input.
    """
    plan, on_cpu = dry_run(config), choose_device(config.hardware).type == "cpu"
    try:
        with FakeTensorMode(), torch.random.fork_rng(devices=[]):
            predicted = _predict(config, plan)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ValueError(
            f"estimate: {plan.model_type} computes by the values of its input ({error.func}), which are not known here"
        ) from None
    return Estimate(plan=plan, baseline=_baseline() if on_cpu and baseline else None, **predicted)


def _predict(config: RunConfig, plan: DryRun) -> dict[str, Any]:
    """All that follows from shapes."""
    settings = config.apt_config()
    run = _Simulation(config, settings, plan)
    phases = {"before pruning": run.step()}
    dense, batch = phases["before pruning"].flops, run.batch
    savings = [(event.step, saving) for event in plan.events if (saving := _saving(event)) is not None]
    if savings and savings[0][0] > 0:
        run.let_masks_fall()
        phases["masks fall"] = run.step()
    distillation, taught = run.run.distillation, 0.0
    if distillation is not None:
        run = _Simulation(config, settings, plan, taught=True)
        run.prune(savings[0][1])
        phases["first with a teacher"] = run.step()
        steps = len(range(distillation.first, distillation.end, settings.distillation.distill_every))
        taught = (phases["first with a teacher"].flops - run.step(taught=False).flops) * steps / plan.total_steps
    stays = distillation is not None and distillation.end >= plan.total_steps
    run = _Simulation(config, settings, plan, taught=stays)
    if plan.events:
        if savings:
            run.prune(savings[-1][1])
        run.grow([event.rank_budget for event in plan.events if event.rank_budget is not None])
        phases["after the last event"] = run.step()
    last = (run.step(taught=False) if stays else list(phases.values())[-1]).flops
    plain = [build_on_meta(config, "cpu"), unpatch_model(run.model)]
    inference = _batch(config, plain[0], config.evaluation.inference_batch_size, config.evaluation.inference_length)
    of_dense, of_small = (forward_flops(model, inference) for model in plain)
    lora = _Simulation(config, _lora(settings), plan).step().flops
    end = list(phases.values())[-1]
    return {
        "phases": phases,
        "measuring": sum(p.numel() * p.element_size() for model in plain for p in model.parameters())
        + sum(end.bytes_of[kind] for kind in ("weights", "adapters", "head", "moments")),
        "step_speedup": dense / end.flops,
        "inference_speedup": of_dense / of_small,
        "run_over_lora": (_mean_flops(plan, savings, dense, last) + taught) / lora,
        "batch": tuple(batch["input_ids"].shape),
    }


def _saving(event: PlannedEvent) -> float | None:
    """The fraction of the blocks that an event asks to be gone by then; None where only ranks grow."""
    return event.sparsity if event.speedup is None else 1.0 - 1.0 / event.speedup


def _lora(settings: APTConfig) -> APTConfig:
    """The same adapters under method "lora", and nothing else."""
    bare = APTConfig(method="lora", rank=settings.rank, scale=settings.scale)
    return replace(bare, target_modules=settings.target_modules) if not settings.prompts else bare


def _mean_flops(plan: DryRun, savings: list[tuple[int, float]], dense: int, last: int) -> float:
    """Of a step of the run: between the events they follow the sparsity in a straight line."""
    total, spent, flops, before = plan.total_steps, 0.0, float(dense), 0
    for step, saving in savings:
        spent += flops * (step - before)
        share = saving / savings[-1][1] if savings[-1][1] else 0.0
        flops, before = dense + (last - dense) * share, step
    spent += (flops if savings else float(last)) * (total - before)
    return spent / total


class _Simulation:
    """A patched model of fake tensors at a moment of a run; where it is `taught`, the model as it begins teaches it."""

    def __init__(self, config: RunConfig, settings: APTConfig, plan: DryRun, *, taught: bool = False) -> None:
        self.config, self.settings = config, settings
        self.model = build_on_meta(config, "cpu")
        patch_model(self.model, replace(settings, adapter=replace(settings.adapter, svd_cache=None)))
        self.model.train()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = OPTIMIZERS[config.training.optimizer](trained, lr=config.training.learning_rate)
        self.run = Controller(self.model, self.optimizer, plan.total_steps, held_out=lambda _: 0.0)
        self.teaching = self.run.distillation if taught else None
        if self.teaching is not None:
            self.teaching.distiller.snapshot()
        data, blocks = config.data, config.model.task == "language_modeling"
        length = data.block_length if blocks else data.max_length
        most = positions(self.model)
        self.batch = _batch(
            config, self.model, config.training.batch_size, length if most is None else min(length, most)
        )

    def let_masks_fall(self) -> None:
        """As in the window before an event; the masks have no numbers that could say so."""
        for group in self.run.groups:
            group.gate._masked = True

    def prune(self, saving: float) -> None:
        """Let units go as an event does, at random salience in proportion to what a unit costs."""
        groups, state = self.run.groups, patch_state(self.model)
        assert state.family is not None
        draw = np.random.default_rng(0)
        with unset_fake_temporarily():
            scores = {g.name: torch.tensor(g.cost() * (0.5 + draw.random(g.num_units))) for g in groups}
            by_params = UnitSearch(state.block_params, replace(self.settings.pruning, target_speedup=None))
            plan = by_params.plan(groups, scores, block_params(self.model, state.family), 1, saving)
        apply_prune_plan(self.model, plan, self.optimizer, keep_tail=self.teaching is not None)
        if self.teaching is not None:
            self.teaching.follow()

    def grow(self, budgets: list[int]) -> None:
        """Let ranks grow to each budget; which adapters matter is drawn."""
        draw, tuning = np.random.default_rng(0), self.settings.tuning
        order = {name: float(draw.random()) for name, _ in adapted(self.model)}
        for step, budget in enumerate(budgets, 1):
            sizes, most = adapter_sizes(self.model, order), tuning.max_rank
            grown = plan_ranks(sizes, step, budget, most, strategy=tuning.rank_increase_strategy, rule=tuning.rule)
            apply_rank_plan(self.model, grown, self.optimizer)

    def step(self, *, taught: bool = True) -> Footprint:
        """The footprint of a training step now; with its teacher, if it has one and is to be `taught`."""
        teaching = self.teaching if taught else None
        if self.teaching is not None:
            self.teaching.distiller.listen(taught)
        adapters: list[Tensor] = [
            p for _, module in adapted(self.model) for p in module.parameters() if p.requires_grad
        ]
        ours = {id(parameter) for parameter in adapters}
        head: list[Tensor] = [p for p in self.model.parameters() if p.requires_grad and id(p) not in ours]
        if self.teaching is not None:
            head += self.teaching.distiller.teacher.head.values()
        accumulate = self.config.training.gradient_accumulation_steps > 1
        groups: dict[str, list[Tensor]] = {
            "adapters": adapters,
            "head": head,
            "temporaries": list(self.batch.values()),
        }
        self.model.train()
        return measure_step(self.model, self.optimizer, partial(self._forward, teaching), groups, accumulate=accumulate)

    def _forward(self, teaching: Distillation | None) -> tuple[Tensor, list[Tensor]]:
        narrow = AUTOCAST.get(self.config.hardware.precision)
        with nullcontext() if narrow is None else torch.autocast("cpu", dtype=narrow):
            output = self.model(**self.batch)
        loss = output.loss
        if teaching is not None:
            every = teaching.config.distill_every
            loss = teaching.loss(loss, output, self.batch, -(-teaching.first // every) * every)
        return loss, [value for name, value in output.items() if name.endswith("logits")]


def _batch(config: RunConfig, model: nn.Module, rows: int, length: int) -> dict[str, Tensor]:
    """What the model is called with, and labels as its task has them."""
    ids, task = torch.ones(rows, length, dtype=torch.long), config.model.task
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if getattr(model.config, "type_vocab_size", 0) > 1:
        batch["token_type_ids"] = torch.zeros_like(ids)
    if task == "question_answering":
        return batch | {name: torch.ones(rows, dtype=torch.long) for name in ("start_positions", "end_positions")}
    if task == "summarization":
        return batch | {"labels": torch.ones(rows, config.data.max_target_length, dtype=torch.long)}
    if task in OF_TOKENS:
        return batch | {"labels": ids.clone()}
    return batch | {"labels": torch.ones(rows, dtype=torch.float if task == "regression" else torch.long)}


def _baseline() -> int:
    """Bytes of a process that has loaded what a run loads."""
    done = subprocess.run([sys.executable, "-c", BASELINE], capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("VmRSS")]
    if not lines:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise ValueError(f"estimate: the memory of a process cannot be measured here: {reason}")
    return int(lines[0].split()[1])
