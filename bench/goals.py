"""What we set out to show, what was measured, and by which command: every bar with its figure, missed ones too.

``python -m bench.goals`` prints the table; `bench.report` writes it into docs/results.md. Figures come from the CSV
files of one machine alone, the latest row of each kind; a bar without rows is `unmeasured`.
"""

import argparse
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from bench import copy_task_cut
from bench.accuracy import over_lora
from bench.events import LEAST, missed
from bench.plan import results
from bench.rows import read_rows

Rows = list[dict[str, str]]
Read = Callable[[str], Rows]  # from the name of a benchmark to its rows on one machine
DENSE, LATENCY_BATCH = "dense, or LoRA merged", "32"


@dataclass(frozen=True)
class Goal:
    """A bar: a figure that is to be at most, or at least, so much."""

    claim: str
    bench: str  # module of bench whose command measures it, and whose rows hold it
    measured: Callable[[Read], float | None]  # None: not measured
    most: float | None = None
    least: float | None = None

    def line(self, read: Read) -> str:
        """A row of the table."""
        found = self.measured(read)
        bar = f"at most {self.most:g}" if self.most is not None else f"at least {self.least:g}"
        if found is None:
            said = "`unmeasured`"
        else:
            met = found <= self.most if self.most is not None else self.least is not None and found >= self.least
            said = f"{found:.4g}, {'met' if met else '**missed**'}"
        return f"| {self.claim} | {bar} | {said} | `python -m bench.{self.bench}` |"


def table(read: Read) -> str:
    """All bars of a machine."""
    header = ["| on one machine, the demo's encoder where no other is named | goal | measured | command |"]
    return "\n".join([*header, "|---|---|---|---|", *(goal.line(read) for goal in GOALS)]) + "\n"


def read_from(folder: Path) -> Read:
    """The rows of one machine, by the name of the benchmark."""
    return lambda name: read_rows(folder / f"{name}.csv")


def _latest(rows: Iterable[dict[str, str]], *keys: str) -> Rows:
    """The last row of each kind."""
    return list({tuple(row[key] for key in keys): row for row in rows}.values())


def step(contestant: str, column: str, shape: str | None = None) -> Callable[[Read], float | None]:
    """A ratio of one training step, the largest over the shapes that were measured."""

    def measured(read: Read) -> float | None:
        rows = [r for r in read("train_step") if r["contestant"] == contestant and shape in (None, r["shape"])]
        rows = [r for r in rows if r.get(column)]  # one that failed has no figure
        return max((float(r[column]) for r in _latest(rows, "shape", "dtype")), default=None)

    return measured


def last_phase(read: Read) -> float | None:
    """Peak memory of a process that resumes behind the last event at 60 %, over that of PEFT's LoRA from that step."""
    rows = {r["arm"]: float(r["peak_mb"]) for r in read("last_phase") if r["seed"] == "0"}
    return _over(rows.get("apt-60"), rows.get("lora"))


def answers(column: str) -> Callable[[Read], float | None]:
    """Of the exported model at 60 %: how many times faster than dense, or as a share of what its FLOPs allow."""

    def measured(read: Read) -> float | None:
        wanted = {"shape": "minilm", "batch": LATENCY_BATCH, "model": "apt 60% free"}
        rows = [r for r in read("inference") if all(r[key] == value for key, value in wanted.items())]
        if not rows:
            return None
        faster, allowed = float(rows[-1]["speedup"]), float(rows[-1]["flop_ratio"])
        return faster if column == "speedup" else faster / allowed

    return measured


def run(bench: str, label: str, column: str) -> Callable[[Read], float | None]:
    """A mean of whole runs over that of PEFT's LoRA, over the seeds that both have."""
    key = "arm" if bench == "finetune" else "label"

    def measured(read: Read) -> float | None:
        rows = [r for r in read(bench) if r.get(column) and not (bench == "finetune" and r["overrides"])]
        ours, lora = ({r["seed"]: float(r[column]) for r in rows if r[key] == name} for name in (label, "lora"))
        both = [seed for seed in ours if seed in lora]
        return _over(*(statistics.mean(side[seed] for seed in both) for side in (ours, lora))) if both else None

    return measured


def time_with_teacher(read: Read) -> float | None:
    """CPU seconds of whole runs at 60 % with a teacher over LoRA's, each on the machine of its row."""
    rows = read("accuracy")
    found = [over_lora(row, rows) for row in rows if row["label"] == "apt-60"]
    return statistics.mean(ratio for ratio in found if ratio is not None) if any(found) else None


def statistics_cost(read: Read) -> float | None:
    """A step with gates and salience over one without."""
    found = [float(r["ratio"]) for r in read("cost") if r["part"] == "step" and r["axis"] == "gates and salience"]
    return found[-1] if found else None


def events_missed(read: Read) -> float | None:
    """How many events that removed enough left a step no faster, or as much kept for backward, with ranks held."""
    rows = _latest(read("events"), "shape", "mode", "event")
    judged = [row for row in rows if float(row["removed"]) >= LEAST and "held" in row["mode"]]
    return float(sum(bool(missed(row)) for row in judged)) if judged else None


def longest(bench: str, column: str) -> Callable[[Read], float | None]:
    """The largest figure of all rows."""
    return lambda read: max((float(row[column]) for row in read(bench) if row.get(column)), default=None)


def least_match(read: Read) -> float | None:
    return min((float(row["ratio"]) for row in read("copy_task")), default=None)


def least_match_cut(read: Read) -> float | None:
    """With the defaults of compress."""
    rows = [row for row in read("copy_task_cut") if row["arm"] == next(iter(copy_task_cut.ARMS))]
    return min((float(row["exact_match_repaired"]) for row in rows if row["target_sparsity"] == "0.5"), default=None)


def perplexity(read: Read) -> float | None:
    """APT over magnitude pruning at the same size and steps, by the seeds that both have."""
    found = {(row["arm"], row["seed"]): float(row["perplexity"]) for row in read("decoder")}
    pairs = [(found["apt", seed], found["magnitude", seed]) for arm, seed in found if arm == "apt"
             and ("magnitude", seed) in found]  # fmt: skip
    return _over(*map(statistics.mean, zip(*pairs, strict=True))) if pairs else None


def decoder_over_lora(read: Read) -> float | None:
    """Perplexity after the tuning, repaired and corrected, over that of LoRA unpruned, by the seeds that both have."""
    found = {(row["arm"], row["seed"]): float(row["perplexity"]) for row in read("decoder")}
    pairs = [(mine, found["lora", seed]) for (arm, seed), mine in found.items()
             if arm == "apt stream" and ("lora", seed) in found]  # fmt: skip
    return _over(*map(statistics.mean, zip(*pairs, strict=True))) if pairs else None


def at_the_cut(read: Read) -> float | None:
    """Perplexity of the same before any tuning over that of the dense model; the largest of the seeds."""
    rows = read("decoder")
    dense = next((float(row["perplexity"]) for row in rows if row["arm"] == "dense"), None)
    found = [float(row["perplexity_untuned"]) for row in rows if row["arm"] == "apt stream"]
    return _over(max(found), dense) if found else None


def _over(above: float | None, below: float | None) -> float | None:
    return None if above is None or below is None else above / below


GOALS = (
    Goal('a step of `patch_model(method="lora")` over PEFT\'s, worst shape', "train_step",
         step("apt lora", "over_peft"), most=1.0),
    Goal("a step of `patch_model(peft_model)` over PEFT's, worst shape", "train_step",
         step("peft lora, patched", "over_peft"), most=1.0),
    Goal("a step after the last event at 60 % over PEFT LoRA's", "train_step",
         step("apt 60%", "over_peft", "minilm"), most=0.5),
    Goal("peak memory of the phase after the last event at 60 % over PEFT LoRA's", "last_phase", last_phase, most=0.7),
    Goal("a step with gates and salience over one without", "cost", statistics_cost, most=1.05),
    Goal("events of 3 % or more after which a step is no faster or keeps as much", "events", events_missed, most=0.0),
    Goal("the longest event, search and surgery, s", "events", longest("events", "event_seconds"), most=1.0),
    Goal("the search of a 13B-sized problem, s", "search", longest("search", "s_p50"), most=1.0),
    Goal("inference at 60 %, times dense, batch 32", "inference", answers("speedup"), least=2.2),
    Goal("the same as a share of what its FLOPs allow", "inference", answers("share"), least=0.85),
    Goal("a whole run at 60 % over PEFT LoRA's, CPU s", "finetune", run("finetune", "apt-60", "train_cpu_seconds"),
         most=0.6),
    Goal("the same at 80 %", "finetune", run("finetune", "apt-80", "train_cpu_seconds"), most=0.55),
    Goal("a whole run at 60 % with teacher over PEFT LoRA's, CPU s", "accuracy", time_with_teacher, most=0.95),
    Goal("peak memory of a whole run at 60 % over PEFT LoRA's", "accuracy", run("accuracy", "apt-60 alone", "peak_mb"),
         most=1.05),
    Goal("accuracy at 60 % over PEFT LoRA's", "finetune", run("finetune", "apt-60", "accuracy"), least=0.99),
    Goal("accuracy at 80 % over PEFT LoRA's", "finetune", run("finetune", "apt-80", "accuracy"), least=0.97),
    Goal("accuracy at 60 % with teacher over PEFT LoRA's", "accuracy", run("accuracy", "apt-60", "accuracy"),
         least=1.0),
    Goal("accuracy at 80 % with teacher over PEFT LoRA's", "accuracy", run("accuracy", "apt-80", "accuracy"),
         least=0.98),
    Goal("accuracy at 90 % with teacher over PEFT LoRA's", "accuracy", run("accuracy", "apt-90", "accuracy"),
         least=0.95),
    Goal("exact match of a tiny T5 at 50 % over the unpruned, worst seed", "copy_task", least_match, least=0.97),
    Goal("exact match of that T5 cut by half at once and repaired, worst seed", "copy_task_cut",
         least_match_cut, least=0.5),
    Goal("perplexity of SmolLM2 at 30 % over magnitude pruning's", "decoder", perplexity, most=0.8),
    Goal("perplexity of SmolLM2 at 30 %, repaired and not tuned, over dense", "decoder", at_the_cut, most=1.45),
    Goal("the same after 40 steps, over unpruned LoRA's", "decoder", decoder_over_lora, most=1.2),
    Goal("accuracy at 60 % with a repaired cut over PEFT LoRA's", "repaired",
         run("repaired", "apt-60 repaired", "accuracy"), least=1.0),
    Goal("accuracy at 80 % with a repaired cut over PEFT LoRA's", "repaired",
         run("repaired", "apt-80 repaired", "accuracy"), least=0.99),
    Goal("accuracy at 90 % with a repaired cut over PEFT LoRA's", "repaired",
         run("repaired", "apt-90 repaired", "accuracy"), least=0.975),
    Goal("a whole run at 60 % with a repaired cut over PEFT LoRA's, CPU s", "repaired",
         run("repaired", "apt-60 repaired", "train_cpu_seconds"), most=0.6),
    Goal("the same at 80 %", "repaired", run("repaired", "apt-80 repaired", "train_cpu_seconds"), most=0.5),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=results("train_step").parent, help="folder of one machine")
    print(table(read_from(parser.parse_args().results)))


if __name__ == "__main__":
    main()
