"""Draws docs/idea.svg, the picture on the README, from the records of a run of the demo.

    python -m apt train examples/demo.yaml evaluation.event_timing_steps=60
    PYTHONPATH=. python docs/draw_idea.py runs/demo

Three panels over one axis of training steps, a thin line through all of them at each event. What is pale is gone, or
not there yet:

- a ribbon a layer, as thick as the share of its heads and neurons that is left;
- a ribbon a layer, as thick as the mean rank of its adapters;
- the time of a training step, as a share of that before the first event. Steps differ in their number of tokens and
  other work disturbs the clock, so it is that of event_timing.json: the model before and after each event takes the
  same batch forward and backward in turns, the medians are compared, and the shares of the events are multiplied. An
  event too small to be timed changes nothing here.

The same folder gives the same bytes. Words and colours are middle tones, legible on white and on near-black.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import matplotlib
from matplotlib.figure import Figure

from apt.runs.report.pictures import BLUE, GREEN, GREY, ORANGE, STYLE
from apt.runs.report.records import RunRecord, load_run

PICTURE = Path(__file__).with_name("idea.svg")
# Inches: 800 pixels wide.
SIZE = (8.35, 5.0)
HEIGHTS = (1.3, 1.3, 0.9)
# Fractions of the width between which the panels lie; words stand beside them.
LEFT = 0.265
RIGHT = 0.845
# Query, key, value and output hold 4 d^2 weights of a layer, the two matrices of its FFN 8 d^2.
HEADS_SHARE = 1 / 3
# Thickness of the thickest ribbon in its lane, whose height is 1.
LANE = 0.8
PALE = 0.16
# From one small line of words to the next, a fraction of the height.
LINE = 0.039
# Contrast of 4.3 with white and of 4.4 with GitHub's near-black.
INK = "#747b85"


class Words(NamedTuple):
    """What stands beside a panel: a few large letters, and below them smaller ones."""

    large: str
    small: str


def kept_by_layer(run: RunRecord) -> list[list[float]]:
    """Give the share of its weights that each layer has left, at the start and after each event."""
    start = run.shapes[0]["units"]
    layers = dict.fromkeys(name.rpartition(".")[0] for name in start if "." in name)
    rows = []
    for layer in layers:
        row = []
        for shape in run.shapes:
            heads = shape["units"].get(f"{layer}.heads", 0) / start[f"{layer}.heads"]
            neurons = shape["units"].get(f"{layer}.neurons", 0) / start[f"{layer}.neurons"]
            row.append(HEADS_SHARE * heads + (1 - HEADS_SHARE) * neurons)
        rows.append(row)
    return rows


def ranks_by_layer(run: RunRecord) -> list[list[float]]:
    """Give the mean rank of the adapters in each layer, at the start and after each event."""
    start = run.shapes[0]
    adapters: dict[tuple[str, int], list[str]] = {}
    for name in start["ranks"]:
        stack, index, _ = start["places"][name]
        adapters.setdefault((stack, index), []).append(name)
    rows = []
    for names in adapters.values():
        rows.append([fmean(shape["ranks"].get(name, 0) for name in names) for shape in run.shapes])
    return rows


def times_left(run: RunRecord) -> list[float]:
    """Give the time of a step as a share of the first, at the start and after each event."""
    ratios = {row["step"]: row["ratio"] for row in run.timings["events"]}
    shares = [1.0]
    for event in run.events:
        shares.append(shares[-1] / ratios.get(event.step, 1.0))
    return shares


def draw_ribbons(axes: Any, bounds: Sequence[int], rows: list[list[float]], color: str) -> None:
    """Draw a ribbon a row, the first on top; the greatest value of all fills its pale lane."""
    greatest = max(max(row) for row in rows)
    for lane, row in enumerate(rows):
        middle = -lane
        half = [LANE / 2 * value / greatest for value in [*row, row[-1]]]
        low = [middle - value for value in half]
        high = [middle + value for value in half]
        ends = [bounds[0], bounds[-1]]
        axes.fill_between(ends, middle - LANE / 2, middle + LANE / 2, color=color, alpha=PALE, linewidth=0)
        axes.fill_between(bounds, low, high, step="post", color=color, linewidth=0)
    axes.set_ylim(0.6 - len(rows), 0.6)


def draw_times(axes: Any, bounds: Sequence[int], shares: list[float]) -> None:
    """Draw stairs, pale above them up to the time of the start."""
    stairs = [*shares, shares[-1]]
    axes.fill_between([bounds[0], bounds[-1]], 0, 1, color=GREEN, alpha=PALE, linewidth=0)
    axes.fill_between(bounds, 0, stairs, step="post", color=GREEN, linewidth=0)
    axes.set_ylim(0, 1)


def mark_events(panels: Sequence[Any], events: Sequence[int]) -> None:
    """Draw a thin line at each event through all panels, and say above the first panel what they are."""
    for axes in panels:
        for step in events:
            axes.axvline(step, color=GREY, linewidth=0.9, linestyle=(0, (1, 2)), zorder=0.5)
    words = f"{len(events)} events: heads and neurons are cut out, ranks grow"
    place: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
    panels[0].annotate(words, (events[0], 1.0), xytext=(0, 5), color=INK, fontsize=10, va="bottom", **place)


def write_words(axes: Any, color: str, x: float, words: Words) -> None:
    """Write beside a panel, from x of the picture's width on."""
    box = axes.get_position()
    middle = (box.y0 + box.y1) / 2
    axes.figure.text(x, middle + 0.014, words.large, color=color, fontsize=15, fontweight="bold")
    for number, line in enumerate(words.small.splitlines(), 1):
        axes.figure.text(x, middle + 0.006 - LINE * number, line, color=INK, fontsize=10)


def draw_idea(run: RunRecord) -> Figure:
    """Draw the three panels of a run, with words on the left that say what they show, and on the right how they end."""
    events = [event.step for event in run.events]
    bounds = [0, *events, run.metrics["steps"]]
    kept = kept_by_layer(run)
    ranks = ranks_by_layer(run)
    shares = times_left(run)

    figure = Figure(figsize=SIZE)
    panels = figure.subplots(3, 1, sharex=True, gridspec_kw={"height_ratios": HEIGHTS})
    figure.subplots_adjust(left=LEFT, right=RIGHT, top=0.93, bottom=0.1, hspace=0.16)
    draw_ribbons(panels[0], bounds, kept, BLUE)
    draw_ribbons(panels[1], bounds, ranks, ORANGE)
    draw_times(panels[2], bounds, shares)
    mark_events(panels, events)
    for axes in panels:
        axes.grid(False)
        axes.spines[:].set_visible(False)
        axes.set_xlim(0, bounds[-1])
        axes.set_yticks([])
        axes.tick_params(length=0, colors=INK, labelsize=10)
    panels[2].set_xlabel("training step", color=INK, fontsize=10)

    first_rank = fmean(row[0] for row in ranks)
    last_rank = fmean(row[-1] for row in ranks)
    captions = [
        Words("Weights shrink", f"heads and neurons\nin each of {len(kept)} layers"),
        Words("Ranks grow", "of the small adapters\nthat learn in each layer"),
        Words("Steps get faster", "time of a training step"),
    ]
    results = [
        Words(f"{1 - run.events[-1].sparsity:.0%}", "are left"),
        Words(f"{first_rank:.0f} → {last_rank:.0f}", "on average"),
        Words(f"{shares[-1]:.0%}", "of the time"),
    ]
    for axes, color, caption, result in zip(panels, (BLUE, ORANGE, GREEN), captions, results, strict=True):
        write_words(axes, color, 0.008, caption)
        write_words(axes, color, RIGHT + 0.02, result)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run that pruned, let ranks grow and timed its events")
    parser.add_argument("--out", type=Path, default=PICTURE)
    arguments = parser.parse_args()
    with matplotlib.rc_context(STYLE):
        figure = draw_idea(load_run(arguments.run))
        figure.savefig(arguments.out, metadata={"Date": None, "Creator": None}, transparent=True)
    print(arguments.out)


if __name__ == "__main__":
    main()
