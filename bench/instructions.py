"""Instructions with one right response each: a decoder pruned before it is tuned on them, beside PEFT's LoRA.

``python -m bench.instructions [--arms lora "apt stream"] [--seeds 0 1 2] [--steps 60]``

Seven kinds of instructions are made from a seed: sort words, write in capitals, count, reverse a list, pick a word, add
and subtract, name an opposite; 20 of each are held out, and no prompt of them is trained on. A prompt is in the chat
template of the model, the loss is on the response alone. Arms and their settings are those of `bench.decoder`, on the
model of examples/smollm2.yaml; units are chosen, and repaired, on training examples.

Scores are on the held out responses with the end of their turn, the right tokens before each: the share of tokens that
the model puts first, and of responses all of whose tokens it does, which is what greedy generation gives back exactly.
One CSV row a run, each in a process of its own; rows that are there already are skipped.
"""

import argparse
import json
import random
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from apt.families import IGNORED
from apt.runs.config import load_config
from apt.runs.data import Examples, InstructionLoader
from apt.runs.models import build_model, build_tokenizer
from bench import decoder
from bench.apart import row_of
from bench.grid import Rows
from bench.plan import results
from bench.rows import append_row, environment, read_rows
from bench.training import block_parameters

SCRATCH = Path("bench/scratch/instructions")
ARMS = ("dense", "lora", "apt stream", "apt obs")
LONGEST = 96  # tokens of a prompt with its response
EACH, HELD_OUT_EACH = 220, 20  # instructions of a kind, where there are so many; and how many of them are held out
_NOUNS = """
    apple bear boat book bread bridge candle chair cloud coin desk dog door drum engine farm fish flower garden glass
    hammer horse island jacket kite ladder lamp lemon mirror moon nest ocean orange paper pencil piano river road salt
    ship spoon star stone table tiger train tree valley window zebra
"""
_OPPOSITES = """
    hot:cold big:small up:down open:closed early:late fast:slow hard:soft light:dark loud:quiet new:old rich:poor
    strong:weak tall:short true:false wet:dry young:aged high:low happy:sad clean:dirty full:empty near:far thick:thin
    wide:narrow deep:shallow sharp:blunt smooth:rough sweet:bitter brave:cowardly cheap:expensive safe:dangerous
    left:right first:last north:south summer:winter day:night love:hate win:lose buy:sell push:pull begin:end
"""
NOUNS, OPPOSITES = _NOUNS.split(), _OPPOSITES.split()
PLACES = ("first", "second", "third", "fourth")

Made = tuple[str, str]  # an instruction and its response


def _sort(draw: random.Random) -> Made:
    words = draw.sample(NOUNS, draw.randint(3, 5))
    return f"Sort these words alphabetically: {', '.join(words)}", ", ".join(sorted(words))


def _capitals(draw: random.Random) -> Made:
    words = draw.sample(NOUNS, draw.randint(2, 3))
    return f"Write in capital letters: {' '.join(words)}", " ".join(words).upper()


def _count(draw: random.Random) -> Made:
    words = draw.choices(NOUNS, k=draw.randint(2, 8))
    return f"How many words are in this list? {', '.join(words)}", str(len(words))


def _reverse(draw: random.Random) -> Made:
    words = draw.sample(NOUNS, draw.randint(3, 4))
    return f"Reverse this list: {', '.join(words)}", ", ".join(reversed(words))


def _pick(draw: random.Random) -> Made:
    words, place = draw.sample(NOUNS, 5), draw.randrange(4)
    return f"What is the {PLACES[place]} word of this list? {', '.join(words)}", words[place]


def _arithmetic(draw: random.Random) -> Made:
    a, b = draw.randint(1, 50), draw.randint(1, 50)
    if draw.random() < 0.5:
        return f"What is {a} plus {b}?", str(a + b)
    return f"What is {max(a, b)} minus {min(a, b)}?", str(abs(a - b))


def _opposite(draw: random.Random) -> Made:
    pair = draw.choice(OPPOSITES).split(":")
    draw.shuffle(pair)
    return f"What is the opposite of {pair[0]}?", pair[1]


FAMILIES: dict[str, Callable[[random.Random], Made]] = {
    "sort": _sort,
    "capitals": _capitals,
    "count": _count,
    "reverse": _reverse,
    "pick": _pick,
    "arithmetic": _arithmetic,
    "opposite": _opposite,
}


def instructions(seed: int = 0) -> tuple[list[Made], list[Made]]:
    """Those to train on, and those held out: of each kind distinct ones, no instruction in both."""
    draw = random.Random(seed)
    train: list[Made] = []
    held_out: list[Made] = []
    for family in FAMILIES.values():
        made: dict[str, str] = {}
        for _ in range(20 * EACH):  # a kind with fewer than EACH gives all that it draws
            if len(made) < EACH:
                made.update([family(draw)])
        rows = list(made.items())
        held_out += rows[:HELD_OUT_EACH]
        train += rows[HELD_OUT_EACH:]
    return train, held_out


def write_data(folder: Path) -> Path:
    """The instructions as a folder that `data.datasets` takes."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(("train", "test"), instructions(), strict=True):
        lines = [json.dumps({"instruction": asked, "response": response}) for asked, response in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@torch.inference_mode()
def scores(model: nn.Module, data: Examples, collate: Callable[..., Any], batch_size: int) -> dict[str, float]:
    """`token_accuracy` and `exact_match` of responses, given the right tokens before each; and `test_tokens`."""
    tokens = right = whole = 0
    for start in range(0, len(data), batch_size):
        batch = collate([data[index] for index in range(start, min(start + batch_size, len(data)))])
        targets_BT = batch.pop("labels")[:, 1:]
        asked_BT = targets_BT != IGNORED
        hits_BT = (model(**batch).logits[:, :-1].argmax(-1) == targets_BT) & asked_BT
        tokens += int(asked_BT.sum())
        right += int(hits_BT.sum())
        whole += int((hits_BT == asked_BT).all(1).sum())
    return {"token_accuracy": right / tokens, "exact_match": whole / len(data), "test_tokens": tokens}


def run(config_path: Path, arm: str, seed: int, overrides: list[str], folder: Path) -> dict[str, Any]:
    """Train one arm and score it; `folder` gets the data, and the small model of a pruned one."""
    data_folder = write_data(folder / "data")
    ours = ["model.task=instruction_following", f"dataset={data_folder}", "data.filter=null", "data.test_size=null"]
    ours += [f"data.max_length={LONGEST}", "data.max_train_samples=null", "data.max_test_samples=null"]
    ours += ["training.batch_size=8", f"training.seed={seed}"]
    config = load_config(config_path, [*ours, *overrides, *decoder.settings_of(arm)])
    tokenizer = build_tokenizer(config)
    data = InstructionLoader(config.data, tokenizer, seed)
    torch.manual_seed(seed)  # of the adapters
    model = build_model(config, None, tokenizer)
    total = block_parameters(model)
    row: dict[str, Any] = {"steps": 0, "train_seconds": 0.0, "train_cpu_seconds": 0.0}
    if arm != "dense":
        model, row = decoder.train(arm, model, config, data, folder)
    row |= {"params": sum(p.numel() for p in model.parameters()), "sparsity": 1.0 - block_parameters(model) / total}
    row |= scores(model.eval(), data.test, data.collator, config.evaluation.inference_batch_size)
    row |= {"batch": config.training.batch_size, "train_size": len(data.train), "test_size": len(data.test)}
    return {"arm": arm, "seed": seed} | row | {"overrides": " ".join(overrides)} | environment()


def table(rows: Rows) -> str:
    """One line an arm and its settings: means over seeds, with their spread; times over LoRA's of the same seeds."""
    lora = {(row["overrides"], row["seed"]): float(row["train_cpu_seconds"]) for row in rows if row["arm"] == "lora"}
    header = [
        "arm",
        "seeds",
        "parameters",
        "sparsity",
        "token accuracy",
        "exact match",
        "training, CPU s",
        "over LoRA's",
    ]
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    for arm, overrides in dict.fromkeys((row["arm"], row["overrides"]) for row in rows):
        mine = [row for row in rows if (row["arm"], row["overrides"]) == (arm, overrides)]
        paired = [(row, lora[overrides, row["seed"]]) for row in mine if (overrides, row["seed"]) in lora]
        over = [float(row["train_cpu_seconds"]) / seconds for row, seconds in paired]
        cells = [f"{arm} {overrides}".rstrip(), str(len(mine)), f"{int(mine[0]['params']):,}"]
        cells += [_spread(mine, "sparsity", 3), _spread(mine, "token_accuracy", 4), _spread(mine, "exact_match", 4)]
        cells += [_spread(mine, "train_cpu_seconds", 0), f"{statistics.mean(over):.3f}" if over else "-"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _spread(rows: Rows, name: str, digits: int) -> str:
    values = [float(row[name]) for row in rows]
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def run_apart(config: Path, arm: str, seed: int, overrides: list[str], folder: Path) -> dict[str, Any]:
    """`run` in a process of its own; SystemExit where it failed."""
    command = ["bench.instructions", "--one", "--config", str(config), "--arms", arm]
    command += ["--seeds", str(seed), "--scratch", str(folder), "--set", *overrides]
    return row_of(command, f"{arm}, seed {seed}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("examples/smollm2.yaml"))
    parser.add_argument("--arms", nargs="+", type=decoder.arm_name, default=list(ARMS), help="of bench.decoder")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, default=results("instructions"))
    parser.add_argument("--scratch", type=Path, default=SCRATCH)
    parser.add_argument("--set", nargs="*", default=[], help="key=value overrides of the config, for every arm")
    parser.add_argument("--one", action="store_true", help="run one arm and seed here and print its row as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.one:
        row = run(arguments.config, arguments.arms[0], arguments.seeds[0], arguments.set, arguments.scratch)
        print("ROW " + json.dumps(row), flush=True)
        return
    overrides = [*arguments.set, f"training.max_steps={arguments.steps}"]
    for seed in arguments.seeds:
        for arm in arguments.arms:
            done = {(row["arm"], row["seed"], row["overrides"]) for row in read_rows(arguments.out)}
            if (arm, str(seed), " ".join(overrides)) in done:
                continue
            folder = arguments.scratch / f"{arm} {seed}"
            shutil.rmtree(folder, ignore_errors=True)
            row = run_apart(arguments.config, arm, seed, overrides, folder)
            append_row(arguments.out, row)
            print(f"{arm} seed {seed}: exact match {row['exact_match']:.3f}, {row['train_cpu_seconds']} s", flush=True)
    text = table(read_rows(arguments.out))
    arguments.out.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
