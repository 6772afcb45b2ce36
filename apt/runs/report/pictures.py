"""One look for every picture: an SVG for the page, which turns dark with it, and a PNG beside it."""

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SIZE = (4.4, 2.9)  # inches: on a narrow screen a picture is shown at about its own size, and stays legible
INK = "#0b0f14"  # of text and axes; no other colour of a picture is this one
BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#3b82c4", "#d9822b", "#2f9e6e", "#cc4f45", "#8d6cc4", "#8a8f98"
SERIES = (BLUE, ORANGE, GREEN, PURPLE, RED, GREY)  # middle tones: they show on white and on near-black
# In an <img> the reader's colour scheme is that of the page.
DARK = "<style>svg{color:#20262d}@media (prefers-color-scheme:dark){svg{color:#d5dae1}}</style>"
SOFTWARE = "apt-lm"  # what a PNG of ours says of itself, in its first HEAD bytes
HEAD = 1024
STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "legend.fontsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "font.family": "sans-serif",
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GREY,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "legend.frameon": False,
    "svg.fonttype": "path",  # the same letters everywhere, at the widths they were laid out with
    "svg.hashsalt": "apt",  # the same run, the same page
}


@dataclass(frozen=True)
class Picture:
    """A drawn picture."""

    name: str  # of its file
    title: str
    alt: str  # what it shows, in words
    svg: str
    png: bytes


def check_drawing() -> None:
    """Whether pictures and pages can be made here; ImportError says what to install."""
    import importlib.util

    missing = [name for name in ("matplotlib", "jinja2") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"report: the page needs {' and '.join(missing)}; pip install 'apt-lm[plots]'")


def draw(name: str, title: str, alt: str, plot: Callable[[Any], None], height: float = SIZE[1]) -> Picture:
    """A picture of one pair of axes, on which `plot` draws. No display and no global state of matplotlib is touched."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(SIZE[0], height), layout="constrained")
        plot(figure.add_subplot())
        svg, png = io.StringIO(), io.BytesIO()
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
        figure.savefig(png, format="png", dpi=150, metadata={"Software": SOFTWARE})
    return Picture(name, title, alt, _follow_scheme(svg.getvalue()), png.getvalue())


def is_drawn_here(path: Path) -> bool:
    """Whether a PNG says that it was drawn by this file; one of an older version does not, and stays."""
    if path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        return b"Software\x00" + SOFTWARE.encode() in file.read(HEAD)


def _follow_scheme(svg: str) -> str:
    """Text and axes in the colour of the scheme."""
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    return re.sub(r"(<svg[^>]*>)", lambda match: match[1] + DARK, svg, count=1)


def mark_events(axes: Any, steps: list[int]) -> None:
    """A thin line at each event, and a word on what it is."""
    for index, step in enumerate(steps):
        label = "event" if index == 0 else None
        axes.axvline(step, color=GREY, linewidth=0.8, linestyle=(0, (2, 2)), label=label, zorder=0.5)


def legend(axes: Any) -> None:
    """Below the axes, where it hides nothing."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=min(3, len(labels)))
