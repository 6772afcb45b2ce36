"""What a repaired cut costs beside one forward pass over the same tokens, and how that grows with the width of a layer.

``python -m bench.repair_cost [--shapes bert-base smollm2-135m] [--widths 768 1536 ...] [--batches 8]``

Models have random weights and fewer layers than the published ones (`bench.shapes`), so the share of the embeddings is
not that of a whole model. `apt.compress` cuts 30 % in three rounds, with half as many batches to score units on as for
the moments, as by default. Each measurement is a process of its own, one thread; CPU seconds, and the peak of resident
memory less what was in use before. Time is split by what runs innermost: a moment that is added while units are scored
counts for the moments. One CSV row a part.
"""

import argparse
import json
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import apt
from apt.repair.moments import Collector
from apt.repair.repairer import Repairer
from apt.repair.solve import Moment, solve
from apt.training.controller import calibrated_cut
from apt.training.controller.calibration import model_loss
from bench.grid import Rows
from bench.memory import PeakMemory
from bench.plan import results
from bench.rows import append_rows, environment, read_rows
from bench.shapes import SHAPES

SPARSITY = 0.3
WIDTHS = (768, 1536, 3072, 5632, 11008)
OUTPUTS = 512  # of the linear whose width is varied
FORWARD, WHOLE, SOLVE = "a forward pass", "compress", "solve"
PARTS = ("scoring", "passes for moments", "adding moments", "solving", "the rest")


class Split:
    """CPU seconds by name; of parts inside each other, the innermost counts."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._settle()
        self._open.append(name)
        try:
            yield
        finally:
            self._settle()
            self._open.pop()

    def _settle(self) -> None:
        now = time.process_time()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return call


def forward(name: str, batches: int) -> list[dict[str, Any]]:
    """A pass of the plain model over all batches."""
    model, taken = _model_and_batches(name, batches)
    model.eval()
    with torch.no_grad(), PeakMemory() as peak:
        started = time.process_time()
        for batch in taken:
            model(**batch)
        seconds = time.process_time() - started
    return [{"part": FORWARD, "cpu_seconds": round(seconds, 3), "peak_mb": round(peak.mb, 1)}]


def compress(name: str, batches: int) -> list[dict[str, Any]]:
    """A compression with its parts, one row each, and one of the whole."""
    model, taken = _model_and_batches(name, batches)
    split = Split()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        if torch.is_grad_enabled():
            return model_loss(model, batch)
        with split.part("passes for moments"):
            return model_loss(model, batch)

    settings: dict[str, Any] = {"moment_batches": batches, "calibration_batches": max(1, batches // 2), "rounds": 3}
    settings["repair"] = "weights"  # a sweep over the streams takes about three passes more
    with ExitStack() as stack:
        peak = stack.enter_context(PeakMemory())
        for owner, function, part in (
            (calibrated_cut, "static_scores", "scoring"),
            (Collector, "__call__", "adding moments"),
            (Repairer, "repair", "solving"),
        ):
            timed = split.timed(part, getattr(owner, function))
            stack.enter_context(mock.patch.object(owner, function, timed if owner is calibrated_cut else _bound(timed)))
        with split.part("the rest"):
            apt.compress(model, taken, SPARSITY, compute_loss=loss, **settings)
    rows = [{"part": part, "cpu_seconds": round(split.seconds[part], 3)} for part in PARTS]
    whole = {"part": WHOLE, "cpu_seconds": round(sum(split.seconds.values()), 3), "peak_mb": round(peak.mb, 1)}
    return [whole, *rows]


def _bound(timed: Callable[..., Any]) -> Callable[..., Any]:
    """As a method of a class."""
    return lambda self, *args, **kwargs: timed(self, *args, **kwargs)


def width(inputs: int, share: float = 1.0 - SPARSITY) -> list[dict[str, Any]]:
    """One linear of so many inputs whose last columns go: its two moments, and the time to solve."""
    draw = torch.Generator().manual_seed(0)
    mixing = torch.randn(64, inputs, generator=draw)  # inputs that tell of each other
    moments = [Moment.zeros(inputs, torch.device("cpu"), torch.float32) for _ in range(2)]
    for moment in moments:
        x_TD = torch.randn(512, 64, generator=draw) @ mixing
        moment.add(x_TD + torch.randn(512, inputs, generator=draw))
    weight_OD, kept_S = torch.randn(OUTPUTS, inputs, generator=draw), torch.arange(round(share * inputs))
    size = sum(moment.second.nbytes for moment in moments)
    with PeakMemory() as peak:
        started = time.process_time()
        found = solve(weight_OD, moments[0], moments[1], kept_S, with_bias=True)
        seconds = time.process_time() - started
    assert found.ridge is not None  # else nothing was solved
    row = {"part": SOLVE, "inputs": inputs, "outputs": OUTPUTS, "moment_mb": round(size / 1e6, 2)}
    return [row | {"cpu_seconds": round(seconds, 3), "peak_mb": round(peak.mb, 1)}]


def _model_and_batches(name: str, count: int) -> tuple[Any, list[dict[str, Tensor]]]:
    model = SHAPES[name].model()
    vocabulary = model.config.vocab_size  # type: ignore[union-attr]
    draw = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(count):
        batch = SHAPES[name].inputs(model)
        ids = torch.randint(5, vocabulary, batch["input_ids"].shape, generator=draw)  # type: ignore[call-overload]
        written = batch["labels"].ndim > 1
        batches.append(batch | {"input_ids": ids, "labels": ids if written else ids[:, 0] % 2})
    return model, batches


def measure(what: str, name: str, batches: int) -> list[dict[str, Any]]:
    """Rows of one process: `what` is "forward", "compress" or "width"."""
    if what == "width":
        return width(int(name))
    shape = SHAPES[name]
    common = {"shape": name, "layers": shape.layers, "of": shape.of, "tokens": shape.batch * shape.tokens * batches}
    return [common | row for row in {"forward": forward, "compress": compress}[what](name, batches)]


def measure_apart(what: str, name: str, batches: int) -> list[dict[str, Any]]:
    """`measure` in a process of its own; SystemExit where it failed."""
    command = [sys.executable, "-m", "bench.repair_cost", "--one", what, name, "--batches", str(batches)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    found = [line[5:] for line in finished.stdout.splitlines() if line.startswith("ROWS ")]
    if not found:
        raise SystemExit(f"{what} of {name} failed:\n{finished.stderr[-2000:]}")
    rows: list[dict[str, Any]] = json.loads(found[0])
    return rows


def table(rows: Rows) -> str:
    """Parts by shape, over the forward pass; then one linear by its width. The latest rows of each count."""
    latest = {(row.get("shape", ""), row.get("inputs", ""), row["part"]): row for row in rows}
    shapes = [shape for shape, _, part in latest if part == FORWARD and (shape, "", WHOLE) in latest]
    header = ["shape", "layers", "tokens", "a forward pass, CPU s", "compress, times that"]
    header += [*PARTS, "peak MB, forward", "compress"]
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    for shape in shapes:
        of = partial(_found, latest, shape)
        base = float(of(FORWARD)["cpu_seconds"])
        times = [f"{float(of(part)['cpu_seconds']) / base:.2f}" for part in (WHOLE, *PARTS)]
        cells = [shape, f"{of(WHOLE)['layers']} of {of(WHOLE)['of']}", f"{int(of(WHOLE)['tokens']):,}", f"{base:.1f}"]
        peaks = [f"{float(of(part)['peak_mb']):,.0f}" for part in (FORWARD, WHOLE)]
        lines.append(f"| {' | '.join([*cells, *times, *peaks])} |")
    lines += ["", f"One linear with {OUTPUTS} outputs, of whose inputs {SPARSITY:.0%} go:", ""]
    lines += ["| inputs | both moments, MB | solving, CPU s | peak MB while solving |", "|---|---|---|---|"]
    for _, inputs, _ in sorted((key for key in latest if key[2] == SOLVE), key=lambda key: int(key[1])):
        row = latest["", inputs, SOLVE]
        cells = [f"{int(inputs):,}", f"{float(row['moment_mb']):,.1f}", f"{float(row['cpu_seconds']):.2f}"]
        lines.append(f"| {' | '.join(cells)} | {float(row['peak_mb']):,.0f} |")
    return "\n".join(lines) + "\n"


def _found(latest: dict[tuple[str, str, str], dict[str, str]], shape: str, part: str) -> dict[str, str]:
    return latest[shape, "", part]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=["bert-base", "smollm2-135m"])
    parser.add_argument("--widths", nargs="*", type=int, default=list(WIDTHS))
    parser.add_argument("--batches", type=int, default=8, help="for the moments; every eighth is held out")
    parser.add_argument("--out", type=Path, default=results("repair_cost"))
    parser.add_argument("--one", nargs=2, metavar=("WHAT", "NAME"), help="measure that here and print its rows as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.one:
        print("ROWS " + json.dumps(measure(*arguments.one, arguments.batches)), flush=True)
        return
    asked = [(what, shape) for shape in arguments.shapes for what in ("forward", "compress")]
    for what, name in [*asked, *(("width", str(width)) for width in arguments.widths)]:
        rows = measure_apart(what, name, arguments.batches)
        append_rows(arguments.out, [row | environment() for row in rows])
        print({key: rows[0].get(key) for key in ("shape", "inputs", "part", "cpu_seconds", "peak_mb")}, flush=True)
    text = table(read_rows(arguments.out))
    arguments.out.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
