"""The goals with limit, figure and verdict, drawn from the rows of a run. What was not measured says so."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from apt_kernels import selection
from bench.kernels.group import OP as GROUP
from bench.kernels.linear import OP
from bench.kernels.plan import BIG, ENCODER

Row = dict[str, str]
OURS = ("torch", *selection.KERNELS[OP])
BOTH, FORWARD = "forward+backward", "forward"
LAYERS_OF_A_BLOCK = {"square": 4, "up": 2, "down": 1}  # of a decoder of 7 billion parameters
GATES_OF_A_BLOCK = {"square": 3, "up": 1}  # by the layer whose output has their width: heads, hidden twice; neurons


class Line(NamedTuple):
    """One line of the table. `figure` is None where something it needs was not measured."""

    goal: str
    what: str
    limit: float
    figure: float | None
    by: str = ""  # the implementation
    at_least: bool = False

    def text(self) -> str:
        sign = ">=" if self.at_least else "<="
        if self.figure is None:
            return f"| {self.goal} | {self.what} | {sign} {self.limit:g} | unmeasured | {self.by} | |"
        met = self.figure >= self.limit if self.at_least else self.figure <= self.limit
        verdict = "met" if met else "missed"
        return f"| {self.goal} | {self.what} | {sign} {self.limit:g} | {self.figure:.4g} | {self.by} | {verdict} |"


class Rows:
    """The rows of one run, to be asked for medians and values."""

    def __init__(self, rows: list[Row]) -> None:
        self.good = [row for row in rows if row["status"] == "ok" and row.get("implementation")]
        self.linear = [row for row in self.good if row.get("op") == OP]
        self.grouped = [row for row in self.good if row.get("op") == GROUP and row["what"] == BOTH]
        layers = [row for row in self.linear if row["layer"] in BIG]
        self.element = 4 if any(row["dtype"] == "float32" for row in layers) else 2  # bytes
        self.tokens = sorted({int(row["tokens"]) for row in layers})
        ranks = sorted({int(row["rank"]) for row in layers})
        self.ranks = dict(zip(("low", "rank", "high"), ranks, strict=False)) if len(ranks) == 3 else {}
        if len(ranks) in (1, 2):  # a run that was cut short begins with the middle rank, then takes the high one
            self.ranks = dict(zip(("rank", "high"), ranks, strict=False))

    def find(self, layer: str, tokens: int, rank: str, what: str, masks: str, graph: bool) -> list[Row]:
        mode = masks + (" graph" if graph else "")
        wanted = (layer, str(tokens), str(self.ranks.get(rank, "")), what)
        return [
            row
            for row in self.linear
            if (row["layer"], row["tokens"], row["rank"], row["what"]) == wanted and row["case"].endswith(" " + mode)
        ]

    def ms(
        self, layer: str, tokens: int, rank: str, names: tuple[str, ...] = OURS, *,
        what: str = BOTH, masks: str = "plain", graph: bool = False,
    ) -> tuple[float, str] | None:  # fmt: skip
        """The least median of these contestants, and whose it is."""
        found = self.find(layer, tokens, rank, what, masks, graph)
        timed = [(float(row["median_ms"]), row["implementation"]) for row in found if row["implementation"] in names]
        return min(timed) if timed else None

    def value(self, what: str, layer: str, rank: str, name: str) -> float | None:
        rows = [row for row in self.linear if row["what"] == what and row["layer"] == layer]
        rows = [r for r in rows if r["rank"] == str(self.ranks.get(rank, "")) and r["implementation"] == name]
        return float(rows[-1]["value"]) if rows else None

    def passed(self, kind: str, shape: tuple[int, int]) -> float | None:
        """The least median of a pass over ``[rows, width]``."""
        rows = [row for row in self.good if row.get("what") == "pass" and row["layer"] == kind]
        timed = [float(r["median_ms"]) for r in rows if (int(r["tokens"]), int(r["d_in"])) == shape]
        return min(timed, default=None)


def over(a: tuple[float, str] | None, b: tuple[float, str] | None) -> float | None:
    return a[0] / b[0] if a and b else None


def against_frozen(rows: Rows) -> Iterator[Line]:
    limits = {"G1": ("rank", (1.16, 1.12, 1.12)), "G2": ("high", (1.22, 1.16, 1.16))}
    for goal, (rank, each) in limits.items():
        for layer, limit in zip(BIG, each, strict=True):
            for T in rows.tokens or [0]:
                mine = rows.ms(layer, T, rank)
                figure = over(mine, rows.ms(layer, T, rank, ("frozen",)))
                yield Line(
                    goal, f"{layer}, T {T}, rank {rows.ranks.get(rank, '?')}, over frozen", limit, figure, _by(mine)
                )
    for layer in BIG:
        for T in rows.tokens or [0]:
            high, low = rows.ms(layer, T, "high"), rows.ms(layer, T, "low")
            yield Line(
                "G3", f"{layer}, T {T}, time at the high rank over the low one", 1.07, over(high, low), _by(high)
            )


def against_others(rows: Rows) -> Iterator[Line]:
    wanted = [
        ("G4", "square", "plain", "peft same dtype", 1.18),
        ("G4", "square", "plain", "peft default", 1.40),
        ("G5", "square", "decay", "naive masked", 1.30),
        ("G6", "square", "plain", "unsloth style", 1.05),
        ("G6", "up", "plain", "unsloth style", 1.02),
    ]
    for goal, layer, masks, theirs, limit in wanted:
        T = rows.tokens[0] if rows.tokens else 0
        mine = rows.ms(layer, T, "rank", masks=masks)
        figure = over(rows.ms(layer, T, "rank", (theirs,), masks=masks), mine)
        yield Line(goal, f"{layer}, T {T}, {masks}: {theirs} over ours", limit, figure, _by(mine), True)
    yield Line("G7", "over LoRAFusion's kernels, which are not among the baselines", 1.0, None, at_least=True)
    for layers in sorted({row["layer"] for row in rows.grouped}) or ["group of 3"]:
        timed = [(float(r["ratio"]), r["implementation"]) for r in rows.grouped if r["layer"] == layers]
        best = min((pair for pair in timed if pair[1] in OURS), default=None)
        yield Line("G8", f"{layers} layers over as many frozen", 1.08, best[0] if best else None, _by(best))


def encoder(rows: Rows) -> Iterator[Line]:
    graphs = [row for row in rows.linear if row["layer"] in ENCODER]
    T = int(graphs[0]["tokens"]) if graphs else 0
    for layer, limit in zip(ENCODER, (1.7, 1.4, 1.45), strict=True):
        mine = rows.ms(layer, T, "rank", graph=True)
        yield Line("G9", f"{layer}, T {T}, graph, over frozen", limit,
                   over(mine, rows.ms(layer, T, "rank", ("frozen",), graph=True)), _by(mine))  # fmt: skip
        for theirs, masks, least in (("peft same dtype", "plain", 1.25), ("naive masked", "decay", 1.5)):
            best = rows.ms(layer, T, "rank", masks=masks, graph=True)
            figure = over(rows.ms(layer, T, "rank", (theirs,), masks=masks, graph=True), best)
            yield Line("G9", f"{layer}, {masks}, graph: {theirs} over ours", least, figure, _by(best), True)


def memory(rows: Rows) -> Iterator[Line]:
    T = rows.tokens[0] if rows.tokens else 0
    for name in OURS:
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


def salience(rows: Rows) -> Iterator[Line]:
    """What collecting adds to a block, over its frozen layers: the extra time of all its gates, then the kurtosis."""
    T = rows.tokens[0] if rows.tokens else 0
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
    T = rows.tokens[0] if rows.tokens else 0
    plain = rows.ms("square", T, "rank")
    for kind, limit in (("out", 1.03), ("in", 1.15), ("decay", 1.15), ("binary", 1.15)):
        mine = rows.ms("square", T, "rank", masks=kind)
        yield Line("G14", f"square, masks {kind}, over no masks", limit, over(mine, plain), _by(mine))


def trust(rows: Rows) -> Iterator[Line]:
    for name in OURS:
        equal = [float(r["value"]) for r in rows.linear
                 if r["what"] == "runs with equal bits" and r["implementation"] == name]  # fmt: skip
        yield Line("G16", "runs with equal bits, the fewest of all shapes", 20, min(equal, default=None), name, True)
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
    against_frozen, against_others, encoder, memory, salience, masks, trust,
)  # fmt: skip


def first_measurements(rows: Rows) -> list[str]:
    """What decides between the implementations, in TFLOP/s and GB/s."""
    lines = ["| case | what | median ms | rate | over the plain product or frozen |", "|---|---|---|---|---|"]
    wanted = [
        row for row in rows.good if row.get("op") in ("gemm", "copy") or row.get("what") in (BOTH, FORWARD, "pass")
    ]
    for row in wanted:
        rate = f"{row['value']} {row['unit']}"
        what = f"{row['implementation']}, {row['what']}"
        lines.append(f"| {row['case']} | {what} | {row['median_ms']} | {rate} | {row.get('ratio', '')} |")
    return lines


def goal_lines(rows: Rows) -> list[Line]:
    return [line for goal in GOALS for line in goal(rows)]


def excuses(rows: list[Row]) -> list[str]:
    """What was wrong, failed or was left out, a line for each reason."""
    cases: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row["status"] not in ("ok", "done"):
            key = (row["status"], row.get("implementation") or "all", row.get("note", "").replace("|", "/"))
            cases.setdefault(key, []).append(row["case"])
    return [f"- {status}, {name}: {note} ({', '.join(where)})" for (status, name, note), where in cases.items()]


def table(rows: list[Row]) -> str:
    """Markdown: run, goals, what was wrong, failed or left out, and every time."""
    if not rows:
        return "Nothing was measured.\n"
    asked, first = Rows(rows), rows[0]
    facts = ", ".join(
        f"{name} {first.get(name) or 'unknown'}" for name in ("device", "torch", "triton", "commit", "run")
    )
    lines = ["# Kernels", "", f"{facts}.", "", "| goal | measure | limit | figure | implementation | |"]
    lines += ["|---|---|---|---|---|---|"]
    lines += [line.text() for line in sorted(goal_lines(asked), key=lambda line: int(line.goal[1:]))]
    lines += ["", "## Not measured", "", *excuses(rows)]
    lines += ["", "## Times", "", *first_measurements(asked)]
    return "\n".join(lines) + "\n"
