"""Bars: each is measured by the rows of its benchmark alone, says when it is missed, and its command exists."""

from pathlib import Path
from typing import Any

import pytest

from bench.goals import GOALS, Goal, read_from, table
from bench.rows import append_rows

EVENT = {"shape": "minilm", "mode": "ranks held", "removed": 0.1, "event_seconds": 0.2}
SMALLER = {f"{name}_{when}": size for name in ("saved_mb", "ms", "parameters_mb") for when, size in
           (("before", 2.0), ("after", 1.0))}  # fmt: skip
ROWS: dict[str, list[dict[str, Any]]] = {
    "train_step": [
        {"shape": shape, "dtype": "float32", "contestant": name, "over_peft": ratio, "peak_mb": peak}
        for shape, name, ratio, peak in (
            ("minilm", "apt lora", 1.3, 300),  # an older row of the same kind
            ("minilm", "peft lora", 1.0, 400),
            ("minilm", "apt lora", 0.8, 300),
            ("bert", "apt lora", 0.9, 300),
            ("minilm", "apt 60%", 0.51, 200),
        )
    ],
    "last_phase": [
        {"arm": arm, "seed": seed, "peak_mb": peak}
        for arm, seed, peak in (("lora", 0, 400), ("apt-60", 0, 900), ("apt-60", 0, 200), ("apt-60", 1, 800))
    ],
    "finetune": [
        {"arm": arm, "seed": seed, "overrides": "", "train_cpu_seconds": seconds, "accuracy": accuracy}
        for arm, seed, seconds, accuracy in (("lora", 0, 100, 0.8), ("lora", 1, 900, 0.1), ("apt-60", 0, 59, 0.8))
    ],
    "accuracy": [
        {"label": label, "seed": seed, "train_cpu_seconds": seconds, "lora_cpu_seconds": beside}
        for label, seed, seconds, beside in (("lora", 0, 100, ""), ("apt-60", 0, 80, ""), ("apt-60", 1, 120, 200))
    ],
    "events": [
        EVENT | SMALLER | {"event": 1},
        EVENT | SMALLER | {"event": 2, "ms_after": 2.0},
        EVENT | SMALLER | {"event": 3, "ms_after": 3.0, "removed": 0.01},
        EVENT | SMALLER | {"event": 4, "ms_after": 3.0, "mode": "ranks grow"},
    ],
    "decoder": [{"arm": arm, "seed": 0, "perplexity": value} for arm, value in (("apt", 60.0), ("magnitude", 100.0))],
}


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    for name, rows in ROWS.items():
        append_rows(tmp_path / f"{name}.csv", rows)
    return tmp_path


@pytest.mark.parametrize(
    ("claim", "said"),
    [
        ('a step of `patch_model(method="lora")` over PEFT\'s', "0.9, met"),  # the worst shape, latest rows
        ("a step after the last event at 60 %", "0.51, **missed**"),
        ("peak memory of the phase after the last event", "0.5, met"),
        ("a step of `patch_model(peft_model)`", "`unmeasured`"),
        ("a whole run at 60 % over PEFT LoRA's", "0.59, met"),  # the seed that both have
        ("a whole run at 60 % with teacher", "0.7, met"),  # each over LoRA on its machine
        ("accuracy at 60 % over PEFT LoRA's", "1, met"),
        ("accuracy at 80 % over PEFT LoRA's", "`unmeasured`"),
        ("events of 3 % or more", "1, **missed**"),  # of those with ranks held
        ("the longest event", "0.2, met"),
        ("perplexity of SmolLM2 at 30 % over magnitude", "0.6, met"),
    ],
)
def test_a_bar_says_what_the_rows_say(claim: str, said: str, machine: Path) -> None:
    (line,) = [line for line in table(read_from(machine)).splitlines() if line.startswith(f"| {claim}")]
    assert f"| {said} |" in line


def test_without_rows_every_bar_is_unmeasured(tmp_path: Path) -> None:
    lines = table(read_from(tmp_path)).splitlines()[2:]
    assert len(lines) == len(GOALS)
    assert all("| `unmeasured` |" in line for line in lines)


@pytest.mark.parametrize("goal", GOALS, ids=lambda goal: goal.claim)
def test_each_has_one_bar_and_a_command_that_is_there(goal: Goal) -> None:
    assert (goal.most is None) != (goal.least is None)
    assert (Path(__file__).parents[2] / "bench" / f"{goal.bench}.py").exists()
