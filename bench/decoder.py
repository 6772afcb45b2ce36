"""A decoder pruned before it is tuned on text: perplexity and speed of APT, PEFT's LoRA and magnitude pruning.

``python -m bench.decoder [--config examples/smollm2.yaml] [--arms dense lora apt magnitude ...] [--seeds 0] [--speed]``

Besides, PEFT's LoRA behind a cut of `bench.plain_cuts`: fewer layers, or narrower FFNs.

Every run is a process of its own with the same blocks, steps and seed; one row a run in bench/results/cpu/decoder.csv.
Rows that are there already are skipped, so a comparison that was stopped goes on. What a run trained stays in
bench/scratch; ``--speed`` takes training steps and generation of these models in turns, in one process, so that what
else the machine does touches all alike (decoder_speed.csv). The tables beside the CSV files are drawn from them alone.
"""

import argparse
import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

import apt
from apt.files.whole import append_jsonl, read_jsonl
from apt.records import Event
from apt.runs.arguments import training_arguments
from apt.runs.config import RunConfig, load_config
from apt.runs.data import Loader, TextLoader
from apt.runs.evaluation.language import generation_rates, greedy, perplexity
from apt.runs.models import build_model, build_tokenizer
from apt.surgery.event import apply_event
from bench import plain_cuts
from bench.apart import row_of
from bench.plan import results
from bench.rivals import FISHER, REPAIRED
from bench.rows import append_row, append_rows, environment, quantiles, read_rows
from bench.timing import Clock
from bench.training import block_parameters, peft_lora

UNREPAIRED = [  # what the config asked for before it repaired
    *("pruning.repair=off", "pruning.rounds=1", "pruning.salience=sum_of_products", "pruning.balance=type"),
    *("pruning.kurtosis=null", "pruning.min_heads=0"),
]
ON_MORE = ["pruning.calibration_batches=16", "pruning.min_heads=1"]
# Overrides of the config. Any arm of `bench.plain_cuts` is one too; these take 30 % of 30 layers.
ARMS: dict[str, list[str]] = {
    "dense": [],
    "lora": [],
    "apt stream": [],  # as the config is
    "apt obs": ["pruning.repair=weights"],
    "apt": UNREPAIRED,
    "apt kurtosis=off": [*UNREPAIRED, "pruning.kurtosis=off"],
    "apt kurtosis=paper": [*UNREPAIRED, "pruning.kurtosis=paper"],
    "apt kurtosis=normalized": [*UNREPAIRED, "pruning.kurtosis=normalized"],
    "apt repaired": [*REPAIRED, *ON_MORE, "pruning.rounds=3"],
    "apt fisher": [*FISHER, *ON_MORE],
    "magnitude": [*UNREPAIRED, "pruning.salience=magnitude", "pruning.kurtosis=off"],
    "first-21": [],
    "influence-21": ON_MORE[:1],
    "ffn-30": ON_MORE[:1],
    "ffn-repaired-30": [*ON_MORE[:1], "pruning.rounds=3"],
}
UNPRUNED = ("dense", "lora")
SCRATCH = Path("bench/scratch/decoder")
MODEL, EVENTS = "model", "events.jsonl"
PROMPT, NEW_TOKENS = 32, 32  # tokens read and made, in the timing of generation and in the text that a row shows


class Probe(TrainerCallback):
    """Measures the model just before the first step, where it is pruned and not tuned yet; its own time is kept."""

    def __init__(self, measure: Callable[[], float]) -> None:
        self.measure, self.value, self.seconds, self.cpu_seconds = measure, math.nan, 0.0, 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step:
            return
        started, cpu = time.perf_counter(), time.process_time()
        model.eval()
        self.value = self.measure()
        model.train()
        self.seconds, self.cpu_seconds = time.perf_counter() - started, time.process_time() - cpu


def run(config_path: Path, arm: str, seed: int, overrides: list[str], folder: Path) -> dict[str, Any]:
    """Train one arm and measure it; `folder` gets the events and the small model of a pruned one."""
    config = load_config(config_path, [*overrides, f"training.seed={seed}", *settings_of(arm)])
    tokenizer = build_tokenizer(config)
    data = TextLoader(config.data, tokenizer, seed)
    torch.manual_seed(seed)  # of the adapters
    model, batch_size = build_model(config, None, tokenizer), config.evaluation.inference_batch_size
    total = block_parameters(model)
    row: dict[str, Any] = {"steps": 0, "train_seconds": 0.0, "train_cpu_seconds": 0.0}
    if arm != "dense":
        model, row = train(arm, model, config, data, folder)
    row |= {"params": sum(p.numel() for p in model.parameters()), "sparsity": 1.0 - block_parameters(model) / total}
    row |= perplexity(model.eval(), data.test, batch_size)
    begin = torch.tensor([data.test[0]["input_ids"][:PROMPT]])
    row["text"] = tokenizer.decode(greedy(model, begin, NEW_TOKENS)[0, begin.shape[1] :])
    setting = {"batch": config.training.batch_size, "block_length": config.data.block_length}
    setting |= {"test_documents": data.test_documents, "overrides": " ".join(overrides)}
    return {"arm": arm, "seed": seed} | row | setting | environment()


def settings_of(arm: str) -> list[str]:
    """What an arm sets in the config."""
    return [*(plain_cuts.overrides(arm) if plain_cuts.parse(arm) else []), *ARMS.get(arm, [])]


def train(arm: str, model: Any, config: RunConfig, data: Loader, folder: Path) -> tuple[Any, dict[str, Any]]:
    """The trained model as it would be deployed (adapters merged, shrunk), and what training cost."""
    probe = Probe(lambda: perplexity(model, data.test, config.evaluation.inference_batch_size)["perplexity"])
    common: dict[str, Any] = {"args": training_arguments(config, folder / "checkpoints"), "train_dataset": data.train}
    common |= {"data_collator": data.collator, "callbacks": [probe]}
    started, cpu = time.perf_counter(), time.process_time()
    if plain_cuts.parse(arm):
        plain_cuts.cut(arm, model, config, data)
    cut_seconds, cut_cpu = time.perf_counter() - started, time.process_time() - cpu  # part of what training costs
    if arm == "lora" or plain_cuts.parse(arm):
        model = peft_lora(model, config)
        trainer: Any = Trainer(model=model, **common)
    else:
        model = apt.patch_model(model, config.apt_config())
        trainer = apt.APTrainer(model=model, **common)
    started, cpu = time.perf_counter(), time.process_time()
    trainer.train()
    row: dict[str, Any] = {"steps": trainer.state.global_step}
    row["train_seconds"] = round(time.perf_counter() - started - probe.seconds + cut_seconds, 2)
    row["train_cpu_seconds"] = round(time.process_time() - cpu - probe.cpu_seconds + cut_cpu, 2)
    row["perplexity_untuned"] = probe.value
    row["losses"] = " ".join(f"{entry['loss']:.3f}" for entry in trainer.state.log_history if "loss" in entry)
    if arm == "lora":
        return model.merge_and_unload(), row
    if plain_cuts.parse(arm):
        apt.export_model(apt.patch_model(model.merge_and_unload(), method="lora"), folder / MODEL)
        return apt.load_model(folder / MODEL), row
    counts = apt.summary(model)
    row |= {"heads": " ".join(map(str, counts.heads)), "neurons": " ".join(map(str, counts.neurons))}
    row["ranks"] = sum(counts.ranks.values())
    for event in trainer.controller.events:
        append_jsonl(folder / EVENTS, event.to_json())
    apt.export_model(model, folder / MODEL)
    return apt.load_model(folder / MODEL), row


def speed(config: RunConfig, folders: dict[str, Path], runs: int) -> list[dict[str, Any]]:
    """Training steps and generation of all arms in turns; ratios are medians of paired ones, over LoRA or dense."""
    tokenizer = build_tokenizer(config)
    dense: Any = build_model(config, None, tokenizer)
    vocabulary = dense.config.vocab_size
    draw = torch.Generator().manual_seed(0)
    models = {"dense": dense.eval()} | {arm: apt.load_model(folder / MODEL) for arm, folder in folders.items()}
    rows = []
    for batch in (1, 8):
        prompts = torch.randint(vocabulary, (batch, PROMPT), generator=draw)
        rates = generation_rates(models, prompts, new_tokens=NEW_TOKENS, repeats=runs)
        for arm, found in rates.items():
            rows.append(_rate_row("generation", arm, f"{batch} x {PROMPT} + {NEW_TOKENS}", found, rates["dense"]))
    steps = {"lora": _training_step(peft_lora(build_model(config, None, tokenizer), config), config, vocabulary)}
    for arm, folder in folders.items():
        if plain_cuts.parse(arm):
            cut = peft_lora(apt.load_model(folder / MODEL), config)
            steps[arm] = _training_step(cut, config, vocabulary)
            continue
        model = apt.patch_model(build_model(config, None, tokenizer), config.apt_config())
        for line in read_jsonl(folder / EVENTS):
            apply_event(model, Event.from_json(line))
        steps[arm] = _training_step(model, config, vocabulary)
    clock = Clock(torch.device("cpu"), runs=runs, seconds=math.inf, warmup=1)
    tokens = config.training.batch_size * config.data.block_length
    times = clock.interleaved({arm: [step] for arm, step in steps.items()})
    found = {arm: [1e3 * tokens / ms for ms in each.device_ms] for arm, each in times.items()}
    shape = f"{config.training.batch_size} x {config.data.block_length}"
    return rows + [_rate_row("training", arm, shape, each, found["lora"]) for arm, each in found.items()]


def _training_step(model: nn.Module, config: RunConfig, vocabulary: int) -> Callable[[], None]:
    optimizer = torch.optim.AdamW([p for p in model.train().parameters() if p.requires_grad], lr=1e-5)
    shape = config.training.batch_size, config.data.block_length
    ids = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(0))

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _rate_row(what: str, arm: str, shape: str, rates: list[float], base: list[float]) -> dict[str, Any]:
    ratio = quantiles([a / b for a, b in zip(rates, base, strict=True)])[1]
    p20, p50, p80 = (round(rate, 2) for rate in quantiles(rates))
    row = {"what": what, "arm": arm, "shape": shape, "tokens_per_s_p20": p20, "tokens_per_s_p50": p50}
    return row | {"tokens_per_s_p80": p80, "ratio_p50": round(ratio, 4), "runs": len(rates)} | environment()


def table(rows: list[dict[str, str]]) -> str:
    """One line an arm and seed; perplexity also over that of LoRA, and of magnitude pruning, of the same seed.

    Time is over that of LoRA of the same seed and commit: another may be of another hour, or machine.
    """
    lora = {_session(row): float(row["train_cpu_seconds"]) for row in rows if row["arm"] == "lora"}
    beside = {(row["arm"], row["seed"], row["overrides"]): float(row["perplexity"]) for row in rows}
    lines = [
        "| arm | seed | parameters | sparsity | perplexity before tuning | after | over LoRA's | over magnitude's "
        "| training, CPU s | over LoRA's |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        key, after, seconds = (row["seed"], row["overrides"]), float(row["perplexity"]), float(row["train_cpu_seconds"])
        bases = [beside.get((arm, *key), math.nan) for arm in ("lora", "magnitude")]
        before = row.get("perplexity_untuned") or row["perplexity"]
        lines.append(
            f"| {row['arm']} {row['overrides']}".rstrip() + f" | {row['seed']} | {int(row['params']):,} "
            f"| {float(row['sparsity']):.3f} | {float(before):,.1f} | {after:,.2f} "
            f"| {after / bases[0]:.3f} | {after / bases[1]:.3f} | {seconds:.0f} "
            f"| {f'{seconds / lora[_session(row)]:.3f}' if _session(row) in lora else '-'} |"
        )
    return "\n".join(lines) + "\n"


def _session(row: dict[str, str]) -> tuple[str, str, str]:
    return row["seed"], row["overrides"], row.get("commit", "")


def speed_table(rows: list[dict[str, str]]) -> str:
    """Ratios of the latest measurement of each arm, taken in turns."""
    latest = {(row["what"], row["shape"], row["arm"]): row for row in rows}
    lines = [
        "| what | tokens | arm | tokens a second | over LoRA's (training), dense (generation) |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {what} | {shape} | {arm} | {float(row['tokens_per_s_p50']):,.1f} | {float(row['ratio_p50']):.3f} |"
        for (what, shape, arm), row in latest.items()
    ]
    return "\n".join(lines) + "\n"


def run_apart(config: Path, arm: str, seed: int, overrides: list[str], folder: Path) -> dict[str, Any]:
    """`run` in a process of its own; SystemExit where it failed."""
    command = ["bench.decoder", "--one", "--config", str(config), "--arms", arm]
    command += ["--seeds", str(seed), "--scratch", str(folder), "--set", *overrides]
    return row_of(command, f"{arm}, seed {seed}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("examples/smollm2.yaml"))
    parser.add_argument(
        "--arms", nargs="+", type=arm_name, default=list(ARMS), help="any of the default, first-24, ..."
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--out", type=Path, default=results("decoder"))
    parser.add_argument("--scratch", type=Path, default=SCRATCH)
    parser.add_argument("--set", nargs="*", default=[], help="key=value overrides of the config, for every arm")
    parser.add_argument("--again", action="store_true", help="also what has a row, such as LoRA for its time of today")
    parser.add_argument("--speed", action="store_true", help="then time training and generation of these arms in turns")
    parser.add_argument("--runs", type=int, default=5, help="of each arm in the timing")
    parser.add_argument("--one", action="store_true", help="run one arm and seed here and print its row as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    overrides, out = arguments.set, arguments.out
    if arguments.one:
        row = run(arguments.config, arguments.arms[0], arguments.seeds[0], overrides, arguments.scratch)
        print("ROW " + json.dumps(row), flush=True)
        return
    for seed in arguments.seeds:
        for arm in arguments.arms:
            done = {(row["arm"], row["seed"], row["overrides"]) for row in read_rows(out)}
            if (arm, str(seed), " ".join(overrides)) in done and not arguments.again:
                continue
            folder = arguments.scratch / f"{arm} {seed}"
            shutil.rmtree(folder, ignore_errors=True)
            row = run_apart(arguments.config, arm, seed, overrides, folder)
            append_row(out, row)
            print(f"{arm} seed {seed}: perplexity {row['perplexity']:.2f}, {row['train_cpu_seconds']} s", flush=True)
    _write(out.with_suffix(".md"), table(read_rows(out)))
    if arguments.speed:
        folders = {arm: arguments.scratch / f"{arm} {arguments.seeds[0]}" for arm in arguments.arms}
        pruned = {arm: folder for arm, folder in folders.items() if arm not in UNPRUNED}
        speeds = out.with_name(f"{out.stem}_speed.csv")
        append_rows(speeds, speed(load_config(arguments.config, overrides), pruned, arguments.runs))
        _write(speeds.with_suffix(".md"), speed_table(read_rows(speeds)))


def arm_name(name: str) -> str:
    """The name of an arm, as an option of a command."""
    if name not in ARMS and not plain_cuts.parse(name):
        raise argparse.ArgumentTypeError(f"no arm is called {name!r}; there are {', '.join(ARMS)}, first-LAYERS, ...")
    return name


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
