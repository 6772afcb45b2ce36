"""The goals G1 to G20 with limit, figure and verdict, drawn from the rows of a run. What was not measured says so.

A goal that no row can hold names the tests that check it; those are no figures of a GPU, so it stays unmeasured here.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from bench.kernels.plan import BIG, ENCODER, FULL
from bench.kernels.rows_of_run import AT_BIG, OURS, Rows

COUNTS = "tests: `tests/kernels/test_compile_counts.py`"
GRAPHS = "tests: `tests/kernels/test_lora_kernels.py`"
AHEAD = "tests: `tests/kernels/test_compile_ahead.py`"
LAYERS_OF_A_BLOCK = {"square": 4, "up": 2, "down": 1}  # of a decoder of 7 billion parameters
GATES_OF_A_BLOCK = {"square": 3, "up": 1}  # by the layer whose output has their width: heads, hidden twice; neurons


class Line(NamedTuple):
    """One line of the table. `figure` is None where something it needs was not measured."""

    goal: str
    what: str
    limit: float
    figure: float | None
    by: str = ""  # the implementation; or what checks it instead
    at_least: bool = False

    @property
    def verdict(self) -> str:
        if self.figure is None:
            return "unmeasured"
        met = self.figure >= self.limit if self.at_least else self.figure <= self.limit
        return "met" if met else "**missed**"

    def text(self) -> str:
        sign = ">=" if self.at_least else "<="
        figure = "" if self.figure is None else f"{self.figure:.4g}"
        return f"| {self.goal} | {self.what} | {sign} {self.limit:g} | {figure} | {self.by} | {self.verdict} |"


def over(a: tuple[float, str] | None, b: tuple[float, str] | None) -> float | None:
    return a[0] / b[0] if a and b else None


def against_frozen(rows: Rows) -> Iterator[Line]:
    limits = {"G1": ("rank", (1.16, 1.12, 1.12)), "G2": ("high", (1.22, 1.16, 1.16))}
    for goal, (rank, each) in limits.items():
        for layer, limit in zip(BIG, each, strict=True):
            for T in rows.tokens:
                mine = rows.ms(layer, T, rank)
                figure = over(mine, rows.ms(layer, T, rank, ("frozen",)))
                what = f"{layer}, T {T}, rank {rows.ranks.get(rank, '?')}, over frozen"
                yield Line(goal, what, limit, figure, _by(mine))
    for layer in BIG:
        for T in rows.tokens:
            high, low = rows.ms(layer, T, "high"), rows.ms(layer, T, "low")
            what = f"{layer}, T {T}, time at the high rank over the low one"
            yield Line("G3", what, 1.07, over(high, low), _by(high))


def against_others(rows: Rows) -> Iterator[Line]:
    wanted = [
        ("G4", "square", "plain", "peft same dtype", 1.18),
        ("G4", "square", "plain", "peft default", 1.40),
        ("G5", "square", "decay", "naive masked", 1.30),
        ("G6", "square", "plain", "unsloth style", 1.05),
        ("G6", "up", "plain", "unsloth style", 1.02),
    ]
    for goal, layer, masks, theirs, limit in wanted:
        T = rows.tokens[0]
        mine = rows.ms(layer, T, "rank", masks=masks)
        figure = over(rows.ms(layer, T, "rank", (theirs,), masks=masks), mine)
        yield Line(goal, f"{layer}, T {T}, {masks}: {theirs} over ours", limit, figure, _by(mine), True)
    yield Line("G7", "LoRAFusion's kernels over ours, on one GPU", 1.0, None, "not among the baselines", True)
    for layers in sorted({row["layer"] for row in rows.grouped}) or ["group of 3"]:
        timed = [(float(r["ratio"]), r["implementation"]) for r in rows.grouped if r["layer"] == layers]
        best = min((pair for pair in timed if pair[1] in OURS), default=None)
        yield Line("G8", f"{layers} layers over as many frozen", 1.08, best[0] if best else None, _by(best))


def encoder(rows: Rows) -> Iterator[Line]:
    graphs = [row for row in rows.linear if row["layer"] in ENCODER]
    T = int(graphs[0]["tokens"]) if graphs else FULL.encoder_tokens
    for layer, limit in zip(ENCODER, (1.7, 1.4, 1.45), strict=True):
        mine = rows.ms(layer, T, "rank", graph=True)
        yield Line("G9", f"{layer}, T {T}, graph, over frozen", limit,
                   over(mine, rows.ms(layer, T, "rank", ("frozen",), graph=True)), _by(mine))  # fmt: skip
        for theirs, masks, least in (("peft same dtype", "plain", 1.25), ("naive masked", "decay", 1.5)):
            best = rows.ms(layer, T, "rank", masks=masks, graph=True)
            figure = over(rows.ms(layer, T, "rank", (theirs,), masks=masks, graph=True), best)
            yield Line("G9", f"{layer}, {masks}, graph: {theirs} over ours", least, figure, _by(best), True)


def memory(rows: Rows) -> Iterator[Line]:
    T = rows.tokens[0]
    for name in AT_BIG:
        for layer in BIG:
            saved = rows.value("saved bytes", layer, "rank", name)
            padded = -(-rows.ranks.get("rank", 0) // 16) * 16
            allowed = T * padded * rows.element + 1024
            yield Line("G10", f"{layer}, saved beyond x, of T * padded rank elements + 1 KiB", 1.0,
                       None if saved is None else saved / allowed, name)  # fmt: skip
        mine, peft = (rows.value("peak of forward", "square", "rank", n) for n in (name, "peft same dtype"))
        yield Line("G11", "square, peak of forward over PEFT's", 0.60, mine / peft if mine and peft else None, name)
        work = [rows.value("workspace", layer, rank, name) for layer in BIG for rank in ("rank", "high")]
        known = [value for value in work if value is not None]
        yield Line("G12", "workspace, MiB, the largest of all shapes", 64, max(known) / 2**20 if known else None, name)
    yield Line("G11", "activations of a whole layer over the frozen one's", 1.01, None, "no row of this benchmark")


def salience(rows: Rows) -> Iterator[Line]:
    """What collecting adds to a block, over its frozen layers: the extra time of all its gates, then the kurtosis."""
    T = rows.tokens[0]
    widths = {row["layer"]: (int(row["d_in"]), int(row["d_out"])) for row in rows.linear if row["layer"] in BIG}
    frozen = {layer: rows.ms(layer, T, "rank", ("frozen",)) for layer in BIG}
    extra: list[float | None] = []
    kurtosis: list[float | None] = []
    for layer, count in GATES_OF_A_BLOCK.items():
        width = widths.get(layer, (0, 0))[1]
        with_, plain = rows.passed("gate collecting", (T, width)), rows.passed("gate", (T, width))
        extra.append(None if with_ is None or plain is None else count * (with_ - plain))
        hidden = widths.get("square", (0, 0))[0]
        kurtosis.append(rows.passed("weight_kurtosis", (hidden, width)))
    base = sum(count * found[0] for layer, count in LAYERS_OF_A_BLOCK.items() if (found := frozen[layer]))
    known = base and all(frozen.values()) and None not in extra
    collect = sum(value or 0.0 for value in extra)
    with_weights = collect + sum(value or 0.0 for value in kurtosis)
    yield Line("G13", "collecting over the frozen layers of a block, %", 3, 100 * collect / base if known else None)
    whole = 100 * with_weights / base if known and None not in kurtosis else None
    yield Line("G13", "with the kurtosis of both weights, %", 4, whole)


def masks(rows: Rows) -> Iterator[Line]:
    T = rows.tokens[0]
    plain = rows.ms("square", T, "rank")
    for kind, limit in (("out", 1.03), ("in", 1.15), ("decay", 1.15), ("binary", 1.15)):
        mine = rows.ms("square", T, "rank", masks=kind)
        yield Line("G14", f"square, masks {kind}, over no masks", limit, over(mine, plain), _by(mine))


def compiling(rows: Rows) -> Iterator[Line]:
    """What compiles and when. Nothing is autotuned at a launch, so what a start costs is compiling."""
    yield Line("G15", "new compilations when ranks, tokens or widths change", 0, None, COUNTS)
    yield Line("G15", "graphs of torch.compile over six ranks", 2, None, GRAPHS)
    cold, warm = rows.of_op("compile", "cold"), rows.of_op("compile", "warm")
    yield Line("G19", "compiling every kernel of the benchmark, nothing cached, s", 60, cold, "threads" if cold else "")
    yield Line("G19", "the same from the cache on disk, s", 1, warm, "threads" if warm else "")
    spilled = rows.of_op("resources", "spilled")
    yield Line("G20", "registers spilled, the most of all kernels that ran here", 0, spilled)
    yield Line("G20", "the same on sm_80, sm_90, gfx942, and shared memory within the limit", 0, None, AHEAD)


def trust(rows: Rows) -> Iterator[Line]:
    for name in AT_BIG:
        equal = [float(r["value"]) for r in rows.linear
                 if r["what"] == "runs with equal bits" and r["implementation"] == name]  # fmt: skip
        yield Line("G16", "runs with equal bits, the fewest of all shapes", 20, min(equal, default=None), name, True)
    yield Line("G16", "atomics in the code of any kernel", 0, None, AHEAD)
    for name in OURS:
        mine = [row for row in rows.linear if row["implementation"] == name and row.get("eager_error")]
        ratios = [float(r["error"]) / float(r["eager_error"]) for r in mine if float(r["eager_error"]) > 0]
        yield Line("G17", "error over eager's in the dtype, the worst of those not wrong", 1.2,
                   max(ratios, default=None), name)  # fmt: skip
    halves = [(float(r["median_ms"]), r) for r in rows.linear if r["what"] == "compacted"]
    best = min(halves, key=lambda pair: pair[0])[1] if halves else None
    figure, by = (float(best["value"]), best["implementation"]) if best else (None, "")
    yield Line("G18", "half of the rows as a view, over dense", 0.56, figure, by)


def _by(found: tuple[float, str] | None) -> str:
    return found[1] if found else ""


GOALS: tuple[Callable[[Rows], Iterator[Line]], ...] = (
    against_frozen, against_others, encoder, memory, salience, masks, compiling, trust,
)  # fmt: skip


def goal_lines(rows: Rows) -> list[Line]:
    """Every line of every goal, in the order of their numbers."""
    lines = [line for goal in GOALS for line in goal(rows)]
    return sorted(lines, key=lambda line: int(line.goal[1:]))
