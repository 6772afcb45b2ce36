"""The schedule against the table of the paper's runs, and every way to get it wrong."""

from itertools import pairwise
from typing import Any

import pytest

from apt.pruning import PruningConfig
from apt.pruning.schedule import SparsityScheduler, TuningSchedule, to_steps

# RoBERTa on SST-2 in the original code: 2,105 steps an epoch, 40 epochs (docs/method.md).
SST2 = {"prune_start": 200, "prune_end": 6315, "sparsity_warmup": 2105, "num_events": 10, "decay": 100, "settle": 100}
SST2_EVENTS = [811, 1423, 2034, 2646, 3257, 3869, 4480, 5092, 5703, 6315]
SST2_DENSITIES = [1.0, 1.0, 1.0, 0.860, 0.666, 0.536, 0.457, 0.417, 0.402, 0.400]


def test_absolute_steps_give_the_events_and_densities_of_sst2() -> None:
    schedule = SparsityScheduler(40 * 2105, 0.6, **SST2)
    assert schedule.events == SST2_EVENTS
    assert [round(1.0 - schedule.get_current_sparsity(step), 3) for step in schedule.events] == SST2_DENSITIES


def test_the_rank_budget_of_sst2() -> None:
    schedule = TuningSchedule(40 * 2105, 200, 6315, 10)
    assert schedule.events == SST2_EVENTS
    ratios = [round(schedule.budget_ratio(step, 4.0), 1) for step in schedule.events]
    assert ratios == [1.3, 1.6, 1.9, 2.2, 2.5, 2.8, 3.1, 3.4, 3.7, 4.0]
    assert [schedule.budget_ratio(step, 4.0) for step in (0, 200, 6315, 80_000)] == [1.0, 1.0, 4.0, 4.0]


def test_the_windows_of_sst2() -> None:
    schedule = SparsityScheduler(40 * 2105, 0.6, **SST2)
    windows = [schedule.windows(index) for index in range(10)]
    assert windows == [(event - 200, event - 100) for event in SST2_EVENTS]


def test_other_runs_of_the_paper() -> None:
    mnli = SparsityScheduler(40 * 12272, 0.6, prune_start=200, prune_end=36816, sparsity_warmup=12272, num_events=10)
    assert mnli.events[3] == 14846
    assert round(1.0 - mnli.get_current_sparsity(14846), 3) == 0.841
    rte = SparsityScheduler(40 * 78, 0.6, prune_start=200, prune_end=1872, sparsity_warmup=312, num_events=8)
    assert rte.events[1] == 618
    assert round(1.0 - rte.get_current_sparsity(618), 3) == 0.870


def test_sparsity_rises_from_nothing_to_the_target() -> None:
    schedule = SparsityScheduler(1000, 0.7, sparsity_warmup=0.1)
    asked = [schedule.get_current_sparsity(step) for step in range(1001)]
    assert asked[:121] == [0.0] * 121
    assert all(before <= after for before, after in pairwise(asked))
    assert asked[121] > 0
    assert asked[400:] == [0.7] * 601


@pytest.mark.parametrize("steps", [13, 20, 100, 1000, 84_200])
def test_the_defaults_hold_from_thirteen_steps_on(steps: int) -> None:
    schedule = PruningConfig().schedule(steps)
    events = schedule.events
    assert len(set(events)) == len(events) == 5
    assert events == sorted(events)
    assert events[0] > schedule.start  # one step of statistics at least
    assert events[-1] == schedule.end == int(0.4 * steps)
    for index, event in enumerate(events):
        begins, settled = schedule.windows(index)
        assert (events[index - 1] if index else schedule.start) <= begins <= settled <= event
        assert begins < settled or begins == event  # a decay under one step is a hard switch


@pytest.mark.parametrize("steps", [1, 5, 12])
def test_a_run_too_short_for_the_defaults_is_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=rf"a run of {steps} steps is too short for 5 events .*train for more steps"):
        PruningConfig().schedule(steps)


@pytest.mark.parametrize(
    ("decay", "settle", "windows"),
    [
        (0.5, 0.25, [(25, 75), (125, 175)]),
        (10, 5, [(85, 95), (185, 195)]),
        (0.5, 0, [(50, 100), (150, 200)]),
        (0, 0.2, [(100, 100), (200, 200)]),
        (0.004, 0.0, [(100, 100), (200, 200)]),
        (1.0, 0.5, [(0, 50), (100, 150)]),
        (500, 500, [(100, 100), (200, 200)]),
    ],
    ids=["fractions", "steps", "no settling", "no decay", "under a step", "past the interval", "longer than all"],
)
def test_windows(decay: Any, settle: Any, windows: list[tuple[int, int]]) -> None:
    schedule = SparsityScheduler(400, 0.5, prune_start=0, prune_end=200, num_events=2, decay=decay, settle=settle)
    assert [schedule.windows(index) for index in range(2)] == windows


def test_an_int_is_a_step_and_a_float_a_fraction() -> None:
    assert (to_steps(1, 300), to_steps(1.0, 300), to_steps(0.999, 300)) == (1, 300, 299)
    schedule = SparsityScheduler(300, 0.5, prune_start=30, prune_end=0.5, num_events=4)
    assert schedule.events == [60, 90, 120, 150]


def test_no_events() -> None:
    assert PruningConfig(num_events=0, target_sparsity=0.0).schedule(10).events == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"target_sparsity": 1.0}, r"target_sparsity must be in \[0, 1\), got 1.0"),
        ({"target_sparsity": -0.1}, r"target_sparsity must be in \[0, 1\), got -0.1"),
        ({"target_sparsity": float("nan")}, r"target_sparsity must be in \[0, 1\), got nan"),
        ({"schedule_type": "linear"}, "schedule_type must be 'cubic', got 'linear'"),
        ({"prune_end": 500}, r"too short for 5 events between step 2 and step 500"),
        ({"prune_start": 0.4}, r"too short for 5 events between step 40 and step 40"),
        ({"prune_start": 60}, r"too short for 5 events between step 60 and step 40"),
        ({"num_events": 50}, r"too short for 50 events between step 2 and step 40; .*lower num_events"),
    ],
)
def test_bad_values_of_the_scheduler(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match="schedule: .*" + words) as caught:
        SparsityScheduler(100, **{"target_sparsity": 0.5, **settings})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"tune_start": 10, "tune_end": 10},
            "a run of 100 steps is too short for ranks to grow 5 times between step 10",
        ),
        ({"tune_end": 101}, "too short for ranks to grow 5 times between step 2 and step 101"),
        ({"num_events": 39}, "grow 39 times .*; train for more steps or lower num_tuning_events"),
    ],
)
def test_bad_values_of_the_tuning_schedule(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match="tuning: .*" + words) as caught:
        TuningSchedule(100, **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"target_sparsity": 1.0}, r"target_sparsity must be in \[0, 1\), got 1.0"),
        ({"target_sparsity": -0.5}, r"target_sparsity must be in \[0, 1\), got -0.5"),
        ({"prune_start": 1.5}, r"prune_start must be a fraction in \[0, 1\] or a number of steps, got 1.5"),
        ({"prune_end": -3}, "prune_end must be a fraction .* got -3"),
        ({"sparsity_warmup": -0.1}, "sparsity_warmup must be a fraction"),
        ({"decay": 2.0}, "decay must be a fraction"),
        ({"settle": -1}, "settle must be a fraction"),
        ({"num_events": -1}, "num_events, min_heads and min_neurons must be at least 0"),
        ({"min_heads": -1}, "num_events, min_heads and min_neurons must be at least 0"),
        ({"min_neurons": -1}, "num_events, min_heads and min_neurons must be at least 0"),
        ({"round_to": 0}, "round_to, min_hidden and min_layers must be at least 1"),
        ({"balance": "layer"}, r"balance must be one of \['type', 'none'\], got 'layer'"),
        ({"num_events": 0}, "target_sparsity 0.6 needs num_events of at least 1, got 0"),
        ({"calibration_batches": 0}, "calibration_batches must be at least 1, got 0"),
        ({"salience": "magnitude", "kurtosis": "paper"}, "takes no statistics, so kurtosis must be 'off', got 'paper'"),
    ],
)
def test_bad_values_of_the_settings(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match="pruning: .*" + words):
        PruningConfig(**settings)
