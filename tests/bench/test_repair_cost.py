"""What a repair costs: parts add up to the whole, moments grow with the square of the width, one table of the rows."""

import time

from bench.repair_cost import FORWARD, PARTS, WHOLE, Split, compress, forward, table, width


def busy(seconds: float) -> None:
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass


def test_of_parts_inside_each_other_the_innermost_counts() -> None:
    split = Split()
    with split.part("outer"):
        busy(0.02)
        split.timed("inner", busy)(0.05)
    busy(0.05)
    assert 0.02 <= split.seconds["outer"] < 0.05
    assert 0.05 <= split.seconds["inner"] < 0.09


def test_every_part_is_measured_and_stands_in_the_table() -> None:
    common = {"shape": "toy bert", "layers": 2, "of": 2, "tokens": 128}
    whole, *parts = compress("toy bert", 8)
    assert whole["part"] == WHOLE
    assert [row["part"] for row in parts] == list(PARTS)
    assert all(row["cpu_seconds"] > 0.0 for row in parts)
    assert sum(row["cpu_seconds"] for row in parts) - whole["cpu_seconds"] < 0.01
    (plain,) = forward("toy bert", 8)
    assert plain["part"] == FORWARD
    (narrow,), (wide,) = width(48), width(96)
    assert (narrow["moment_mb"], wide["moment_mb"]) == (0.02, 0.07)  # two matrices of 4 bytes each
    rows = [common | row for row in (plain | {"cpu_seconds": 0.5}, whole, *parts)] + [narrow, wide]
    lines = table([{key: str(value) for key, value in row.items()} for row in rows]).splitlines()
    assert lines[2].startswith("| toy bert | 2 of 2 | 128 | 0.5 | ")
    assert lines[2].count("|") == lines[0].count("|")
    assert [line.split(" | ")[0] for line in lines[-2:]] == ["| 48", "| 96"]
