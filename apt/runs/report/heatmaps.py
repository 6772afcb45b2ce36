"""What is left where: units by layer and event, ranks by layer and role, as coloured tables of numbers."""

import math
import re
from collections.abc import Mapping
from typing import Any

from apt.runs.report.pictures import GREY, Picture, draw
from apt.runs.report.records import RunRecord

NUMBERED_COLUMNS = 9  # with more of them the numbers would not fit into their cells
DARK_SHARE = 0.7  # from here on a cell is dark enough for white numbers
PLACE = re.compile(r"^(.*?)(\d+)\.(.+)$")  # of a module in a layer: what stands before its number, the number, the rest
ROLES = ("q", "k", "v", "o", "up", "gate", "down")


def units(run: RunRecord) -> list[Picture | str]:
    """How many units of each kind each layer has at the start and after each event."""
    kept: list[tuple[int, Mapping[str, int]]] = [
        (event.step, {name: len(positions) for name, positions in event.prune.kept.items()})
        for event in run.events
        if event.prune is not None
    ]
    if not kept:
        return ["Nothing was pruned."]
    starts = [row["units"] for row in run.shapes if not row.get("event", True)]
    columns = [("start", starts[0]), *kept] if starts else kept
    names = dict.fromkeys(name for _, counts in columns for name in counts if name.count("."))
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(name.rpartition(".")[2], []).append(name)
    return [_units(kind, of_kind, columns, whole=bool(starts)) for kind, of_kind in kinds.items()]


def _units(kind: str, names: list[str], columns: list[tuple[Any, Mapping[str, int]]], whole: bool) -> Picture:
    """A row a layer; the colour is the share of what the layer had."""
    cells = [[float(counts.get(name, 0)) for _, counts in columns] for name in names]
    shares = [[value / max(row[0], 1.0) for value in row] for row in cells]
    labels = [name.rpartition(".")[0].replace("layers.", "") for name in names]
    words = kind.replace("_", " ")
    left = f"{sum(row[-1] for row in cells):,.0f} of {sum(row[0] for row in cells):,.0f}"
    since = "" if whole else " (colours: share of those at the first event)"

    def plot(axes: Any) -> None:
        _heat(axes, shares, cells, [str(step) for step, _ in columns], labels)
        axes.set_xlabel("after the event at step")
        axes.set_ylabel("layer")

    alt = f"{words.capitalize()} kept by layer over {len(columns)} columns: {left} at the end{since}."
    return draw(f"kept_{kind}", f"{words.capitalize()} kept: {left}", alt, plot, _height(len(names)))


def ranks(run: RunRecord) -> Picture | str:
    """The rank of the adapter at every place, at the end."""
    final, places = _final_ranks(run)
    if not final:
        return "Not recorded: the run left no shapes.jsonl, and no event let ranks grow."
    found: dict[tuple[str, str], float] = {}
    for name, rank in final.items():
        stack, index, role = places.get(name) or _guess(name)
        row = f"{stack}.{index}".replace("layers.", "")
        found[row, role] = float(rank)
    rows = sorted(dict.fromkeys(row for row, _ in found), key=_by_number)
    roles = sorted(dict.fromkeys(role for _, role in found), key=_by_role)
    cells = [[found.get((row, role), math.nan) for role in roles] for row in rows]
    highest = max(found.values())
    shares = [[value / max(highest, 1.0) for value in row] for row in cells]

    def plot(axes: Any) -> None:
        _heat(axes, shares, cells, [role.replace(".", "\n") for role in roles], rows)
        axes.set_ylabel("layer")
        axes.set_xlabel("linear")

    alt = f"Rank of the adapter at each of {len(found)} places by layer and role: at most {highest:.0f}."
    return draw("ranks", "Ranks at the end", alt, plot, _height(len(rows)))


def _final_ranks(run: RunRecord) -> tuple[dict[str, int], dict[str, Any]]:
    """Ranks by the adapter's name, and where each stands."""
    if not run.shapes:  # a record from before there were shapes: what grew
        grown: dict[str, int] = {}
        for event in run.events:
            grown |= {} if event.rank is None else event.rank.ranks
        return grown, {}
    places = run.shapes[0].get("places") or {}
    names = dict.fromkeys(name for row in run.shapes for name in row["ranks"])
    return {name: run.shapes[-1]["ranks"].get(name, 0) for name in names}, places


def _guess(name: str) -> tuple[str, str, str]:
    """Place of an adapter by its name alone: the first number is that of its layer."""
    match = PLACE.match(name)
    return ("layers", match[2], ".".join(match[3].split(".")[-2:])) if match else ("", name, "")


def _by_number(row: str) -> tuple[str, int]:
    stack, _, index = row.rpartition(".")
    return (stack, int(index)) if index.isdigit() else (row, -1)


def _by_role(role: str) -> tuple[int, str]:
    plain = role.removeprefix("cross ")
    return (ROLES.index(plain) + 10 * (plain != role), "") if plain in ROLES else (99, role)


def _height(rows: int) -> float:
    return 1.0 + 0.24 * max(3, rows)


def _heat(axes: Any, shares: list[list[float]], cells: list[list[float]], columns: list[str], rows: list[str]) -> None:
    """Cells coloured by their share from 0 to 1, with numbers in them where they fit; a place that is none is grey."""
    import numpy as np
    from matplotlib.colors import LinearSegmentedColormap, to_rgb

    colours = LinearSegmentedColormap.from_list("kept", ["#e9eef4", "#7fb0dc", "#1d5a9c"])
    values = np.array(shares, dtype=float)
    painted = colours(np.nan_to_num(values))
    painted[np.isnan(values)] = (*to_rgb(GREY), 0.25)
    axes.grid(False)
    axes.pcolormesh(painted, edgecolors="#ffffff", linewidth=0.6)
    axes.invert_yaxis()
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0)
    every = math.ceil(len(columns) / NUMBERED_COLUMNS)
    axes.set_xticks([place + 0.5 for place in range(0, len(columns), every)], columns[::every])
    axes.set_yticks([place + 0.5 for place in range(len(rows))], rows)
    if len(columns) > NUMBERED_COLUMNS:
        return
    for i, row in enumerate(cells):
        for j, value in enumerate(row):
            if not math.isnan(value):
                colour = "#ffffff" if shares[i][j] > DARK_SHARE else "#1a2129"
                axes.text(j + 0.5, i + 0.5, f"{value:,.0f}", ha="center", va="center", fontsize=7.5, color=colour)
