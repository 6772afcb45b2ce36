"""The rows of one run of the kernel benchmark, to be asked for medians and values."""

from apt_kernels import selection
from bench.kernels.group import OP as GROUP
from bench.kernels.linear import OP
from bench.kernels.plan import BIG, FULL
from bench.kernels.session import split_off_never

Row = dict[str, str]
OURS = ("torch", *selection.KERNELS[OP])
# What runs at the big layers, the narrowest of which has so many outputs.
AT_BIG = tuple(split_off_never(list(OURS), min(FULL.layers[name][1] for name in BIG), FULL.ranks[1])[0])
BOTH, FORWARD = "forward+backward", "forward"
APART = ("tune", "profile", "sweep")  # rows that no goal is about


class Rows:
    """The rows of one run, to be asked for medians and values."""

    def __init__(self, rows: list[Row]) -> None:
        good = [row for row in rows if row["status"] == "ok" and row.get("implementation")]
        self.good = [row for row in good if row.get("what") not in APART]
        self.linear = [row for row in self.good if row.get("op") == OP]
        self.grouped = [row for row in self.good if row.get("op") == GROUP and row["what"] == BOTH]
        layers = [row for row in self.linear if row["layer"] in BIG]
        self.element = 4 if any(row["dtype"] == "float32" for row in layers) else 2  # bytes
        # Where nothing was measured, the sizes that would be.
        self.tokens = sorted({int(row["tokens"]) for row in layers}) or [FULL.tokens[0]]
        ranks = sorted({int(row["rank"]) for row in layers}) or list(FULL.ranks)
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

    def of_op(self, op: str, what: str) -> float | None:
        """The latest value of an op that has one row a run."""
        values = [row["value"] for row in self.good if row.get("op") == op and row["what"] == what]
        return float(values[-1]) if values else None
