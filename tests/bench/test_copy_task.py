"""The copy task: what a batch holds, what counts as a match, and a model that copies on with half of its layers.

The same model also loses half at once.
"""

from typing import Any

import pytest
import torch
from torch import nn

from bench import copy_task, copy_task_cut

SMALL = {"SHORTEST": 2, "LONGEST": 4, "SYMBOLS": 10, "BATCH": 32}
SIZES = {"vocab_size": 12, "d_model": 32, "d_kv": 6, "d_ff": 64, "num_layers": 1}


class Echo(nn.Module):
    """Generates its input, or less of it."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def generate(self, ids: torch.Tensor, **_: Any) -> torch.Tensor:
        start = torch.zeros_like(ids[:, :1])
        longest = int((ids != copy_task.PAD).sum(1).max())
        return torch.cat([start, ids[:, : min(self.most, longest)]], dim=1)  # ends when all have ended


def test_a_batch() -> None:
    batch = copy_task.sequences(200, torch.Generator().manual_seed(0))
    lengths = set()
    for ids, mask, labels in zip(*batch.values(), strict=True):
        length = int(mask.sum())
        symbols = ids[: length - 1].tolist()
        assert len(set(symbols)) == len(symbols)
        assert min(symbols) > copy_task.END
        assert ids[length - 1] == copy_task.END
        assert (ids[length:] == copy_task.PAD).all()
        assert labels[:length].tolist() == ids[:length].tolist()
        assert (labels[length:] == copy_task.IGNORED).all()
        lengths.add(len(symbols))
    assert lengths == set(range(copy_task.SHORTEST, copy_task.LONGEST + 1))


def test_a_match_is_a_whole_sequence() -> None:
    batch = copy_task.sequences(300, torch.Generator().manual_seed(1))
    assert copy_task.exact_match(Echo(100), batch) == 1.0
    first = {key: value[batch["attention_mask"].sum(1) <= 6] for key, value in batch.items()}
    assert copy_task.exact_match(Echo(100), first) == 1.0
    short = float((batch["attention_mask"].sum(1) <= 6).double().mean())
    assert copy_task.exact_match(Echo(6), batch) == short < 1.0


def test_a_cut_is_repaired_and_the_dense_model_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SMALL.items():
        monkeypatch.setattr(copy_task, name, value)
    monkeypatch.setattr(copy_task, "CONFIG", {**copy_task.CONFIG, **SIZES})
    monkeypatch.setattr(copy_task_cut, "BATCHES", {"moment_batches": 16, "calibration_batches": 2})
    model = copy_task.dense_model(0, 20, torch.Generator().manual_seed(0)).eval()
    before = [p.clone() for p in model.parameters()]
    row = copy_task_cut.run(model, 0, "all units in one round", 0.3)
    assert 0.3 <= row["sparsity"] <= 0.35
    assert row["params_pruned"] < row["params_dense"]
    assert 0.0 < row["error_repaired"] < row["error_cut"]
    assert all(torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))  # the next arm's


def test_the_table_of_cuts_is_in_the_order_of_the_arms() -> None:
    common = {"target_sparsity": "0.5", "sparsity": "0.5011", "exact_match_dense": "1.0", "exact_match_cut": "0.0"}
    common |= {"exact_match_repaired": "0.904", "error_cut": "0.2", "error_repaired": "0.05"}
    rows = [common | {"arm": arm, "seed": "1", "compress_cpu_seconds": "3"} for arm in reversed(copy_task_cut.ARMS)]
    lines = copy_task_cut.table(rows).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [f"| {arm}" for arm in copy_task_cut.ARMS]
    assert lines[2].endswith("| 1 | 50.1% | 1.000 | 0.000 | 0.904 | 0.200 | 0.050 | 3 |")


@pytest.mark.slow
def test_half_of_a_model_that_copies_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SMALL.items():
        monkeypatch.setattr(copy_task, name, value)
    monkeypatch.setattr(copy_task, "CONFIG", {**copy_task.CONFIG, **SIZES})
    row = copy_task.run(0, 0.5, dense_steps=450, pruned_steps=220)
    assert row["exact_match_dense"] > 0.8
    assert row["exact_match_pruned"] >= 0.97 * row["exact_match_dense"]
    assert 0.5 <= row["sparsity"] <= 0.53
