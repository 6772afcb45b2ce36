"""The table of the rated reviews compares what was run on the same seeds."""

from bench.ratings import table


def row(arm: str, seed: int, score: float, seconds: float, **more: str) -> dict[str, str]:
    figures = {"train_seconds": str(seconds), "sparsity": "0.6", "speedup": "2.0", "pearson": str(score)}
    return {"task": "mean rating", "arm": arm, "seed": str(seed), "metric": "pearson", **figures, **more}


def test_ratios_are_over_lora_of_the_same_seeds() -> None:
    lora = [row("lora", seed, score, 100.0) for seed, score in enumerate((0.8, 0.9, 0.1))]
    text = table([*lora, row("apt-60", 0, 0.76, 50.0), row("apt-60", 1, 0.94, 70.0)])
    assert "| mean rating | apt-60 | 2 | pearson 0.8500 ± 0.1273 | 1.0000 | 0.600 | 60 | 0.600 | 2.00 |" in text
    assert "| mean rating | lora | 3 | pearson 0.6000 ± 0.4359 | 1.0000 |" in text
    assert "| apt-60 | 1 | pearson 0.7600 | - |" in table([row("apt-60", 0, 0.76, 50.0)])
