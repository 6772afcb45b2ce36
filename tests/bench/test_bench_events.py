"""Before and after each event: the sizes fall, the second training is one event ahead, and a miss is marked."""

from typing import Any

import pytest

from bench import events
from bench.shapes import SHAPES, Shape, _bert


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "tiny", Shape(_bert(32, 4, 100), ("q", "v", "up", "down"), 2, 5, layers=2, of=2))


@pytest.mark.parametrize("mode", events.MODES)
def test_a_step_before_and_after(mode: str) -> None:
    seen = 0
    for before, after in events.events("tiny", mode, 0.6):
        assert len(after.run.events) == len(before.run.events) + 1
        assert (before.run.distillation is not None) is ("teacher" in mode)
        if after.run.events[-1].removed >= events.LEAST:
            seen += 1
            if "held" in mode:
                assert after.saved_bytes() < before.saved_bytes()
            if mode == "ranks held":
                assert after.parameter_bytes() < before.parameter_bytes()
    assert seen >= 3


def test_what_autograd_keeps_is_counted_once() -> None:
    """A linear keeps its input and dropout its mask; weights are parameters."""
    training = events.begin("tiny", "ranks held", 0.6)
    inner = training.saved_bytes()
    assert inner == training.saved_bytes() > 0
    training.batch = {key: value[:1] for key, value in training.batch.items()}
    assert 0.4 * inner < training.saved_bytes() < 0.7 * inner


def test_a_row_an_event_and_its_table() -> None:
    rows: list[dict[str, Any]] = events.measure("tiny", "ranks held", 0.6, runs=1)
    assert [row["event"] for row in rows] == [1, 2, 3, 4, 5]
    assert rows[0]["commit"] is not None
    text = events.table([{key: str(value) for key, value in row.items()} for row in rows])
    assert len(text.splitlines()) == 2 + 5
    slower = {key: str(value) for key, value in rows[0].items()} | {"ms_before": "1.0", "ms_after": "2.0"}
    assert "not smaller: ms**" in events.table([slower])
    assert "not smaller" not in events.table([slower | {"removed": "0.01"}])
