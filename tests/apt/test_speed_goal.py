"""A speed-up as the goal: units priced by a table of times, the schedule in saved time, resume without measuring."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from own_loop import BRIEF, Loop, equal_bits, patched, take_both
from tiny_models import tiny_batch
from torch import Tensor
from unit_groups import ADVERSARIAL, Group, groups_of

import apt
import apt.training.controller.goal
from apt.pruning import PruningConfig, UnitSearch
from apt.pruning.latency_table import LatencyTable, TimePrices
from apt.records import Event

HEADS = [[0, 0.0], [3, 2.0], [12, 4.0]]  # a first head costs more than a last one
NEURONS = [[0, 0.0], [48, 1.0], [96, 2.5]]


def table_of(
    heads: list[list[float]] = HEADS, neurons: list[list[float]] = NEURONS, rest: float = 3.0, layers: int = 4
) -> LatencyTable:
    dense = rest + layers * (heads[-1][1] + neurons[-1][1])
    parts = {"layers.heads": heads, "layers.neurons": neurons}
    return LatencyTable(device="paper", batch_size=2, length=5, dense_ms=dense, rest_ms=rest, parts=parts)


# The table.


def test_between_points_time_is_straight_and_it_never_falls() -> None:
    table = table_of(neurons=[[0, 0.0], [32, 3.0], [64, 2.0], [96, 5.0]])
    assert table.part_ms("layers.7.neurons", np.array([0, 16, 32, 48, 64, 80, 96])).tolist() == [
        0.0,
        1.5,
        3.0,
        3.0,
        3.0,
        4.0,
        5.0,
    ]
    assert table.total_ms({"layers.0.heads": 3, "layers.0.neurons": 16, "layers.1.heads": 0}) == 3.0 + 2.0 + 1.5
    assert LatencyTable.from_json(json.loads(json.dumps(table.to_json()))) == table


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"heads": [[0, 0.0]]}, r"the points of 'layers\.heads' must be pairs of units and ms, ascending from 0"),
        ({"heads": [[1, 0.0], [2, 1.0]]}, "ascending from 0 units"),
        ({"heads": [[0, 0.0], [2, 1.0], [2, 2.0]]}, "ascending from 0 units"),
        ({"heads": [[0, 0.0], [2, -1.0]]}, "none negative"),
        ({"heads": [[0, 0.0], [2, float("nan")]]}, "must be pairs"),
        ({"rest": -1.0}, "rest_ms must be at least 0 and at most dense_ms, got -1.0"),
    ],
)
def test_tables_that_cannot_be(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match="latency: .*" + words):
        table_of(**settings)


def test_the_table_of_another_model() -> None:
    with pytest.raises(ValueError, match=r"the table has no decoder\.cross_heads; it is another model's"):
        table_of().part_ms("decoder.3.cross_heads", 1)
    with pytest.raises(ValueError, match=r"layers\.0\.heads has 13 units, the table ends at 12"):
        table_of().part_ms("layers.0.heads", 13)


# The search.


def ms_of(groups: list[Group], kept: dict[str, list[int]], table: LatencyTable) -> float:
    """Predicted time, added up unit group by unit group."""
    total = table.rest_ms
    for group in groups:
        widths, ms = zip(*table.parts[f"layers.{group.kind}s"], strict=True)
        total += float(np.interp(len(kept[group.name]), widths, ms))
    return total


def searched(
    groups: list[Group], scores: dict[str, Tensor], saving: float, table: LatencyTable, **settings: Any
) -> dict[str, list[int]]:
    config = PruningConfig(target_speedup=2.0, **{"round_to": 8, **settings})
    plan = UnitSearch(table.dense_ms, config, table).plan(groups, scores, table.dense_ms, 1, saving)
    assert plan.target_sparsity is None
    return plan.kept


@pytest.mark.parametrize("layout", ["free", "uniform"])
@pytest.mark.parametrize("round_to", [1, 8])
@pytest.mark.parametrize("scores", [name for name in ADVERSARIAL if "NaN" not in name])
def test_the_time_is_met_and_no_whole_bundle_is_left_over(scores: str, round_to: int, layout: str) -> None:
    torch.manual_seed(0)
    groups, table = groups_of(), table_of()
    given = {group.name: ADVERSARIAL[scores](group.num_units) for group in groups}
    lane = 4 if layout == "uniform" else 1
    widest = lane * max(2.0 / 3, 4.0 - 2.0 * 8 / 9, round_to * 1.5 / 48)  # dearest head, dearest bundle
    floor = 0.0 if layout == "free" else 4 * (2.0 / 3 + round_to / 48)
    for saving in (0.0, 0.1, 0.3, 0.5, 0.7):
        kept = searched(groups, given, saving, table, round_to=round_to, layout=layout)
        budget = (1.0 - saving) * table.dense_ms
        assert 3.0 + floor <= ms_of(groups, kept, table) <= budget * (1 + 1e-8)
        assert ms_of(groups, kept, table) > budget - widest - 1e-8
        if layout == "uniform":
            assert len({len(kept[group.name]) for group in groups if group.kind == "head"}) == 1
    assert all(len(kept[g.name]) == g.num_units for g in groups for kept in [searched(groups, given, 0.0, table)])


def test_the_keep_set_is_the_longest_prefix_of_the_ranking() -> None:
    """Against a walk that adds unit by unit and asks the table for the whole model each time."""
    torch.manual_seed(0)
    groups, table = groups_of(neurons=20), table_of(neurons=[[0, 0.0], [10, 1.0], [20, 3.0]])
    scores = {group.name: torch.rand(group.num_units) for group in groups}
    kept = searched(groups, scores, 0.4, table, round_to=1, balance="none")
    price = {"head": 4.0 / 12, "neuron": 3.0 / 20}
    density = {g.name: (scores[g.name].double() / price[g.kind]).tolist() for g in groups}
    entries = [(-density[g.name][unit], i, unit) for i, g in enumerate(groups) for unit in range(g.num_units)]
    walked: dict[str, list[int]] = {group.name: [] for group in groups}
    for _, index, unit in sorted(entries):
        name = groups[index].name
        walked[name].append(unit)
        if ms_of(groups, walked, table) > 0.6 * table.dense_ms:
            walked[name].pop()
            break
    assert kept == {name: sorted(units) for name, units in walked.items()}


def test_prices_add_up_along_any_order() -> None:
    torch.manual_seed(0)
    groups, table = groups_of(), table_of()
    lanes = [[group] for group in groups]
    prices = TimePrices.of(lanes, table)
    owners = torch.randint(0, len(lanes), (60,)).numpy()
    counts = np.where(owners % 2 == 0, 1, 5)
    counts = np.where((owners % 2 == 0) & (np.arange(60) > 40), 0, counts)
    taken = dict.fromkeys([group.name for group in groups], 0)
    for owner, count, spent in zip(owners, counts, prices.running_cost(owners, counts), strict=True):
        taken[groups[owner].name] += int(count)
        assert spent == pytest.approx(table.total_ms(taken) - table.rest_ms)


def test_what_takes_no_time_stays() -> None:
    groups = groups_of()
    table = table_of(heads=[[0, 0.0], [12, 0.0]])
    scores = {group.name: torch.rand(group.num_units) for group in groups}
    kept = searched(groups, scores, 0.5, table, round_to=1, balance="none")
    assert all(len(kept[group.name]) == 12 for group in groups if group.kind == "head")
    assert ms_of(groups, kept, table) <= 0.5 * table.dense_ms


def check(speedup: float, table: LatencyTable, groups: list[Group], **settings: Any) -> None:
    UnitSearch(table.dense_ms, PruningConfig(target_speedup=speedup, **settings), table).check(groups, table.dense_ms)


def test_a_speed_out_of_reach_says_how_fast_one_can_be() -> None:
    groups, table = groups_of(floor_heads=3), table_of()  # 29 ms dense; 3 + 4 * 2 ms with three heads a layer
    words = (
        r"pruner: target_speedup 3\.0 is not reachable; with min_heads=3 and min_neurons=0 a forward pass of 2 x 5 "
        r"tokens becomes at most 2\.636 times as fast on paper; lower target_speedup or the floors"
    )
    with pytest.raises(ValueError, match=words):
        check(3.0, table, groups, min_heads=3)
    check(2.636, table, groups, min_heads=3)
    with pytest.raises(ValueError, match="not reachable"):
        check(2.637, table, groups, min_heads=3)
    scores = {group.name: torch.rand(group.num_units) for group in groups}
    kept = searched(groups, scores, 1 - 1 / 2.636, table, min_heads=3)
    assert all(len(kept[group.name]) >= group.floor for group in groups)


# A run.


def tiny_table(rest: float = 1.0) -> LatencyTable:
    """Of the tiny BERT: 3 layers of 4 heads and 40 neurons."""
    return table_of([[0, 0.0], [2, 2.0], [4, 3.0]], [[0, 0.0], [40, 2.0]], rest, layers=3)


def no_measuring(*args: Any, **kwargs: Any) -> LatencyTable:
    pytest.fail("measured, though there is a table")


def test_a_run_reaches_its_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apt.training.controller.goal, "measure_latency", no_measuring)
    settings = {"target_speedup": 2.0, "latency": tiny_table(), "verify_events": True, **BRIEF}
    loop = Loop("bert", patched("bert"), 30, **settings).take(20)
    asked = [event.target_speedup for event in loop.run.events]
    scheduled = [0.5 * (1 - (1 - left) ** 3) for left in (1 / 3, 2 / 3, 1.0)]
    assert asked == pytest.approx([1 / (1 - saving) for saving in scheduled])
    counts = apt.summary(loop.model).units
    predicted = tiny_table().dense_ms / tiny_table().total_ms(counts)
    assert loop.run.events[-1].predicted_speedup == predicted
    for event in loop.run.events:
        assert event.predicted_speedup is not None
        assert event.target_speedup <= event.predicted_speedup < 1.5 * event.target_speedup
        assert event.target_sparsity is None
        assert Event.from_json(json.loads(json.dumps(event.to_json()))) == event
    twin = Loop("bert", patched("bert"), 30, **settings).take(20)
    assert [event.prune for event in twin.run.events] == [event.prune for event in loop.run.events]


def test_times_decide_what_goes() -> None:
    kept = {}
    for name, table in {
        "heads dear": table_of([[0, 0.0], [4, 9.0]], [[0, 0.0], [40, 0.1]], 0.5, 3),
        "neurons dear": table_of([[0, 0.0], [4, 0.1]], [[0, 0.0], [40, 9.0]], 0.5, 3),
    }.items():
        loop = Loop("bert", patched("bert"), 30, target_speedup=2.0, latency=table, balance="none", **BRIEF).take(20)
        counts = apt.summary(loop.model)
        kept[name] = sum(counts.heads) / 12, sum(counts.neurons) / 120
    assert kept["heads dear"][0] < 0.6 < 0.9 < kept["heads dear"][1]
    assert kept["neurons dear"][1] < 0.6 < 0.9 < kept["neurons dear"][0]


def test_resume_takes_the_table_of_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a decay, after an event: the table is measured once in the whole life of the run."""
    measured = []
    monkeypatch.setattr(apt.training.controller.goal, "measure_latency", lambda *_: measured.append(1) or tiny_table())
    settings = {"target_speedup": 2.0, "num_events": 3, "prune_end": 24, "round_to": 4}
    first = Loop("bert", patched("bert"), 30, **settings)
    assert not measured  # a resumed run need not measure what it will not use
    first.take(12)
    assert len(measured) == 1
    assert apt.summary(first.model).masked > 0
    monkeypatch.setattr(apt.training.controller.goal, "measure_latency", no_measuring)
    second = first.resumed(patched("bert"), tmp_path, **settings)
    second.run.prepare()
    take_both(first, second, 18)
    assert len(second.run.events) == 3
    assert equal_bits(second.model, first.model)
    assert second.run.events[-1].predicted_speedup == first.run.events[-1].predicted_speedup >= 2.0


def test_before_tuning_the_speed_is_reached_at_once() -> None:
    settings = {"prune_before_tuning": True, "target_speedup": 1.7, "latency": tiny_table(), "round_to": 4}
    loop = Loop("bert", patched("bert"), 30, **settings)
    loop.run.prune_before_tuning([tiny_batch("bert")])
    event = loop.run.events[0]
    assert event.target_speedup == pytest.approx(1.7)
    assert 1.7 <= event.predicted_speedup < 2.4


def test_a_run_on_this_device() -> None:
    """With the table that is measured here; what it predicts is met, whatever the clock said."""
    loop = Loop("bert", patched("bert"), 30, target_speedup=1.01, latency_batch_size=2, latency_length=4, **BRIEF)
    loop.take(20)
    event = loop.run.events[-1]
    assert event.predicted_speedup >= event.target_speedup == pytest.approx(1.01)
    assert loop.run.pruning.goal.table.device == "cpu"
    assert (loop.run.pruning.goal.table.batch_size, loop.run.pruning.goal.table.length) == (2, 4)


def test_a_run_whose_device_cannot_be_so_fast_stops_before_the_first_step() -> None:
    loop = Loop("bert", patched("bert"), 30, target_speedup=9.0, latency=tiny_table(rest=4.0), **BRIEF)
    before = copy.deepcopy(loop.model)
    with pytest.raises(ValueError, match=r"target_speedup 9\.0 is not reachable; .* at most 4\.75 times as fast"):
        loop.take(1)
    assert equal_bits(loop.model, before)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"target_speedup": 0.5}, "target_speedup must be at least 1, got 0.5"),
        ({"target_speedup": float("nan")}, "target_speedup must be at least 1, got nan"),
        ({"target_speedup": 2.0, "unit_types": ("head", "hidden")}, "prices heads and neurons; leave 'hidden' out"),
        ({"target_speedup": 2.0, "num_events": 0}, "target_speedup 2.0 needs num_events of at least 1, got 0"),
        ({"latency_length": 0}, "latency_batch_size and latency_length must be at least 1"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match="pruning: .*" + words):
        PruningConfig(**settings)
