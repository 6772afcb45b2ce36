"""The table of the ablations: paired by sentence and seed, with an interval that a normal approximation confirms."""

import numpy as np
import pytest

from bench.ablations import paired_bootstrap, table


def row(label: str, seed: int, correct: np.ndarray) -> dict[str, str]:
    answers = np.packbits(correct.astype(bool)).tobytes().hex()
    size, accuracy = len(correct), correct.mean()
    return {
        "label": label,
        "seed": str(seed),
        "accuracy": str(accuracy),
        "correct": answers,
        "test_size": str(size),
        "train_cpu_seconds": "10",
    }


def test_the_interval_agrees_with_the_normal_one() -> None:
    draw = np.random.default_rng(1)
    mine, theirs = (draw.random(1501) < share for share in (0.84, 0.80))
    low, high = paired_bootstrap(mine.astype(float), theirs.astype(float))
    difference = mine.astype(float) - theirs
    error = 1.96 * difference.std(ddof=1) / len(difference) ** 0.5
    assert low == pytest.approx(difference.mean() - error, abs=0.1 * error)
    assert high == pytest.approx(difference.mean() + error, abs=0.1 * error)


def test_rows_become_ratios_and_differences() -> None:
    base = np.ones(10)  # ten sentences: not a multiple of eight bits
    worse, half = base.copy(), base.copy()
    worse[:2], half[:5] = 0, 0
    rows = [row("lora", 0, base), row("lora", 1, worse), row("apt-60", 0, worse), row("w/o_AT", 0, half)]
    lines = table(rows).splitlines()
    assert lines[2].startswith("| lora | 2 | 0.9000 ± 0.1414 | 1.0000 | - | - | - |")
    # Only the seed that both have counts: 0.8 against LoRA's 1.0 there.
    assert lines[3].startswith("| apt-60 | 1 | 0.8000 | 0.8000 | lora | -20.00 |")
    assert lines[4].startswith("| w/o_AT | 1 | 0.5000 | 0.5000 | apt-60 | -30.00 |")


def test_identical_answers_have_no_interval() -> None:
    answers = np.random.default_rng(2).random(64) < 0.7
    lines = table([row("lora", 0, answers), row("apt-60", 0, answers)]).splitlines()
    assert "| +0.00 | +0.00 to +0.00 |" in lines[3]
