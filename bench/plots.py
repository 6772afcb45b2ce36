"""Pictures of results, drawn from the rows of a CSV file alone: one PNG a benchmark."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed
from matplotlib import pyplot as plt

from bench.accuracy import SERIES, over_lora, series
from bench.cost import STEEP, slope
from bench.grid import Rows
from bench.train_step import in_order

PANELS = (  # of the accuracy picture: column, what the axis says
    ("sparsity", "fraction of the layers' parameters gone"),
    ("over_lora", "training, CPU s over PEFT LoRA's"),
    ("speedup", "answers, times as fast as dense"),
)


def accuracy(rows: Rows) -> Any:
    """Accuracy against sparsity, training time and speed of answers: a line a method, a point the mean of its seeds.
    Without LoRA no time is drawn, as seconds of different days are nothing to compare."""
    ratios = [over_lora(row, rows) for row in rows]
    rows = [row | {"over_lora": str(ratio or math.nan)} for row, ratio in zip(rows, ratios, strict=True)]
    figure, axes = plt.subplots(1, 3, figsize=(15, 5), sharey=True)
    for number, (name, words) in enumerate(SERIES.items()):
        labels = dict.fromkeys(row["label"] for row in rows if series(row["label"]) == name)
        points = [[row for row in rows if row["label"] == label] for label in labels]
        points.sort(key=lambda mine: float(mine[0]["sparsity"]))
        for axis, (column, _) in zip(axes, PANELS, strict=True):
            if points:
                style = {"marker": "osD^vPX<>ph*d"[number], "linestyle": "-" if len(points) > 1 else "", "label": words}
                axis.plot([_mean(p, column) for p in points], [_mean(p, "accuracy") for p in points], **style)
                for p in points if name == "apt" and column != "sparsity" else []:  # on one line, or none can be read
                    text, spot = f"{_mean(p, 'sparsity'):.0%}", (_mean(p, column), _mean(p, "accuracy"))
                    axis.annotate(text, spot, textcoords="offset points", xytext=(6, -10), fontsize=8)
    for axis, (_, words) in zip(axes, PANELS, strict=True):
        axis.set_xlabel(words)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy on the test sentences")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncols=4)
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    return figure


def train_step(rows: Rows) -> Any:
    """Time of a step of each contestant over that of PEFT's LoRA, which it took turns with; the lines are PEFT's LoRA
    and the frozen limit. Milliseconds of two contestants need not be of the same hour, so they are not drawn."""
    latest = {(row["shape"], row["dtype"], row["device"], row["contestant"]): row for row in in_order(rows)}
    return _bars(
        {key[:3]: [row for k, row in latest.items() if k[:3] == key[:3]] for key in latest},
        name="contestant",
        length=lambda row: float(row["over_peft"]),
        unit="time of a step over that of peft lora",
        mark=lambda row: float(row["over_peft"]) / float(row["over_limit"]),
        mark_name="forward and input gradient of the frozen model",
        base="peft lora",
    )


def inference(rows: Rows) -> Any:
    """How many times as fast as dense each model is, a panel a shape, phase and batch; marks: what FLOPs allow."""
    latest = {(row["shape"], row["device"], row["phase"], f"batch {row['batch']}", row["model"]): row for row in rows}
    return _bars(
        {key[:4]: [row for k, row in latest.items() if k[:4] == key[:4]] for key in latest},
        name="model",
        length=lambda row: float(row["speedup"]),
        unit="times as fast as dense",
        mark=lambda row: float(row["flop_ratio"]),
        mark_name="what its FLOPs allow",
        base="dense, or LoRA merged",
    )


def _bars(
    panels: dict[tuple[str, ...], Rows],
    *,
    name: str,
    length: Callable[[dict[str, str]], float],
    unit: str,
    mark: Callable[[dict[str, str]], float],
    mark_name: str,
    base: str,
) -> Any:
    """Horizontal bars, at most two panels beside each other; a dashed line where the bar of `base` ends."""
    columns = min(2, len(panels))
    lines = math.ceil(len(panels) / columns)
    most = max(len(mine) for mine in panels.values())
    figure, axes = plt.subplots(lines, columns, figsize=(8 * columns, lines * (1.4 + 0.27 * most)), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (key, mine) in zip(axes.flat, panels.items(), strict=False):
        values = [length(row) for row in mine]
        axis.barh([row[name] for row in mine], values, color="tab:blue", alpha=0.6)
        axis.plot([mark(row) for row in mine], range(len(mine)), "k|", markersize=11, zorder=5, label=mark_name)
        for place, value in enumerate(values):  # inside its bar, where no mark of another length can seem to be meant
            axis.text(0.0, place, f"  {value:.3g}", va="center", fontsize=8)
        for row in mine:
            if row[name] == base:
                axis.axvline(length(row), color="tab:red", linestyle="--", label=base)
        axis.invert_yaxis()
        axis.margins(x=0.12)
        axis.set_xlim(left=0)
        axis.set_xlabel(unit)
        axis.set_title(", ".join(key), fontsize=9)
    handles, words = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, words, loc="lower center", ncols=2)
    figure.tight_layout(rect=(0, 0.35 / figure.get_figheight(), 1, 1))
    return figure


def cost(rows: Rows) -> Any:
    """Time of each part over its sizes, both logarithmic, with the fit; a title in red grows worse than linear."""
    latest = {(row["part"], row["axis"], row["size"]): row for row in rows if row["part"] != "step"}
    keys = list(dict.fromkeys(key[:2] for key in latest))
    figure, axes = plt.subplots(
        math.ceil(len(keys) / 4), 4, figsize=(15, 3.6 * math.ceil(len(keys) / 4)), squeeze=False
    )
    for axis in axes.flat[len(keys) :]:
        axis.set_axis_off()
    for axis, key in zip(axes.flat, keys, strict=False):
        mine = [row for other, row in latest.items() if other[:2] == key]
        sizes, times = [float(row["size"]) for row in mine], [float(row["ms_p50"]) for row in mine]
        axis.loglog(sizes, times, "o")
        grows = slope(sizes, times) if len(sizes) > 1 else math.nan
        if len(sizes) > 1:
            middle = math.exp(sum(map(math.log, times)) / len(times) - grows * sum(map(math.log, sizes)) / len(sizes))
            axis.loglog(sizes, [middle * size**grows for size in sizes], "-", alpha=0.5)
        steep = grows > STEEP
        title = f"{key[0]}: size to the {grows:.2f}" + (", worse than linear" if steep else "")
        axis.set_title(title, fontsize=9, color="tab:red" if steep else "black")
        axis.set_xlabel(key[1])
        axis.set_xticks(sizes, [f"{size:,.0f}" if size < 1e6 else f"{size:.1e}" for size in sizes])
        axis.set_yticks(times, [f"{time:,.0f}" if time >= 100 else f"{time:.3g}" for time in times])
        axis.minorticks_off()
        axis.set_ylabel("ms")
        axis.grid(alpha=0.3)
    figure.tight_layout()
    return figure


PICTURES: dict[str, Callable[[Rows], Any]] = {
    "train_step": train_step,
    "inference": inference,
    "cost": cost,
    "accuracy": accuracy,
}


def save(name: str, rows: Rows, path: Path) -> None:
    """Draw the picture of a benchmark."""
    figure = PICTURES[name](rows)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)


def _mean(rows: Rows, column: str) -> float:
    return sum(float(row[column]) for row in rows) / len(rows)
