"""The memory of the last phase at toy size: what the second process trains, and what its table says."""

from pathlib import Path

import pytest
from tiny_run import write_config

from bench.last_phase import ARMS, in_two_processes, table, train
from bench.rows import append_row, read_rows


@pytest.mark.parametrize("arm", list(ARMS))
def test_the_second_part_goes_on_where_the_first_ended(arm: str, tmp_path: Path) -> None:
    config, folder = write_config(tmp_path, training={"max_steps": 40}), tmp_path / "checkpoints"
    folder.mkdir()
    first, second = (train(config, arm, 0, [], folder) for _ in range(2))
    assert (first["from_step"], first["to_step"]) == (0, 22)
    assert (second["from_step"], second["to_step"]) == (22, 40)
    target = 0.0 if arm == "lora" else float(arm[4:6]) / 100
    assert target <= first["sparsity"] == second["sparsity"] < target + 0.1


def test_two_processes_leave_the_row_of_the_second(tmp_path: Path) -> None:
    row = in_two_processes(write_config(tmp_path, training={"max_steps": 20}), "apt-60", 3, ["training.batch_size=4"])
    assert (row["from_step"], row["to_step"]) == (11, 20)
    assert (row["arm"], row["seed"], row["overrides"]) == ("apt-60", 3, "training.batch_size=4")
    assert row["peak_mb"] > 0.0


def test_an_event_in_the_last_part_is_refused(tmp_path: Path) -> None:
    config = write_config(tmp_path, training={"max_steps": 40}, pruning={"prune_end": 0.9})
    with pytest.raises(SystemExit, match=r"the last event is at step 36: set pruning\.prune_end below 0\.55"):
        train(config, "apt-60", 0, [], tmp_path)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_the_table_is_of_the_latest_rows_over_lora_of_the_seed(tmp_path: Path) -> None:
    common = {"seed": 0, "device": "cpu x1", "from_step": 22, "to_step": 40}
    for arm, peak in (("apt-60", 390.0), ("lora", 400.0), ("apt-60", 200.0)):
        sparsity = 0.0 if arm == "lora" else 0.6
        append_row(tmp_path / "rows.csv", common | {"arm": arm, "sparsity": sparsity, "peak_mb": peak})
    other_seed = common | {"seed": 1, "arm": "apt-80", "sparsity": 0.8, "peak_mb": 100.0}
    append_row(tmp_path / "rows.csv", other_seed)
    lines = table(read_rows(tmp_path / "rows.csv")).splitlines()[2:]
    assert lines == [
        "| apt-60 | 0 | 22 to 40 | 0.600 | 200 | 0.500 |",
        "| lora | 0 | 22 to 40 | 0.000 | 400 | 1.000 |",
        "| apt-80 | 1 | 22 to 40 | 0.800 | 100 | - |",
    ]
