"""`bench.repaired`: runs with a repaired cut and what stands beside them, on a tiny model; its table."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_run import write_config

from bench import arms, grid
from bench.grid import Cell, fill
from bench.repaired import GRID, SEEDS, table
from bench.rows import read_rows


def test_a_tiny_grid_gets_a_line_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def here(*given: Any) -> dict[str, Any]:
        return arms.run(*given) | {"run_seconds": 5.0}

    for module in (grid, arms):
        monkeypatch.setattr(module, "run_apart", here)
    monkeypatch.setattr(arms, "SCRATCH", tmp_path / "scratch")
    config, out = write_config(tmp_path, training={"max_steps": 25}), tmp_path / "repaired.csv"
    cells = {label: Cell(GRID[label].arm, GRID[label].overrides) for label in ("lora", "apt-60 repaired", "first-1")}
    cells["ffn-60"] = Cell("ffn-40")  # more is not in these FFNs
    fill(out, config, cells, None, [])
    rows = read_rows(out)
    sizes = {row["label"]: float(row["sparsity"]) for row in rows}
    assert 0.6 <= sizes["apt-60 repaired"] < 0.66
    assert (sizes["lora"], sizes["first-1"]) == (0.0, 0.5)
    assert 0.4 <= sizes["ffn-60"] < 0.43
    assert [line.split(" | ")[0] for line in table(rows).splitlines()[2:]] == [f"| {label}" for label in cells]


def test_runs_are_compared_with_lora_of_their_seed() -> None:
    def row(label: str, seed: int, right: int, seconds: int) -> dict[str, str]:
        bits = np.packbits(np.arange(1000) < right).tobytes().hex()
        found = {"label": label, "seed": str(seed), "accuracy": str(right / 1000), "correct": bits, "test_size": "1000"}
        return found | {"train_cpu_seconds": str(seconds), "lora_cpu_seconds": "20", "sparsity": "0.6", "speedup": "2"}

    rows = [row("lora", 0, 800, 20), row("first-3", 0, 900, 10), row("first-3", 1, 100, 10), row("first-2", 1, 9, 9)]
    _, _, lora, first = table(rows).splitlines()
    assert lora.startswith("| lora | 0.8000 | 0.8000 | 1.0000 | +0.00 | +0.00 to +0.00 | 1.000 |")
    assert first.startswith("| first-3 | 0.9000 | 0.9000 | 1.1250 | +10.00 | +")
    assert first.endswith("| 0.500 | 0.600 | 2.000 |")


def test_the_whole_grid_has_three_seeds() -> None:
    assert {cell.seeds for cell in GRID.values()} == {SEEDS}
