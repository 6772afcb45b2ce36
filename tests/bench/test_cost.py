"""The cost benchmark: its fit finds a known exponent, and each part runs at its sizes."""

import pytest

from bench.cost import part_rows, slope, table


def test_the_slope_of_a_power_law() -> None:
    sizes = [10.0, 40.0, 90.0]
    assert slope(sizes, [3.0 * size**1.7 for size in sizes]) == pytest.approx(1.7)


def test_a_part_is_timed_at_each_size_and_fitted_once() -> None:
    rows = part_rows("salience", runs=2)
    assert [row["size"] for row in rows] == [10, 20, 40]
    assert [("slope" in row) for row in rows] == [False, False, True]
    assert all(row["ms_p50"] > 0.0 for row in rows)


def test_the_table_shows_the_latest_row_of_a_case_and_names_what_is_steep() -> None:
    row = {"part": "surgery", "axis": "parameters", "size": "1000", "ms_p50": "9.0", "slope": "1.5"}
    lines = table([{**row, "ms_p50": "1.0", "slope": "1.0"}, row]).splitlines()
    assert lines[2:] == ["| surgery | parameters | 1,000 | 9.0 |  | 1.5 (worse than linear) |"]
