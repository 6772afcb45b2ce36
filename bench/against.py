"""``--against REF`` of a benchmark: this tree and another git revision take turns, and the ratios are printed.

The other revision stands in a throwaway worktree, under the benchmark of this tree, so that both answer the same
question; one too old for it fails, and says so. Each side is a process of its own, one working at a time, and the turn
changes at every timed run (`bench.turns`), so a noisy machine slows both alike. Nothing is added to the results.
"""

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.rows import read_rows
from bench.turns import VARIABLE

ROOT = Path(__file__).parent.parent
Rows = list[dict[str, str]]


def add_option(parser: argparse.ArgumentParser) -> None:
    text = "time this git revision in turns with this tree, print the ratios, and write nothing"
    parser.add_argument("--against", metavar="REF", help=text)


def compare(module: str, key: Sequence[str], ref: str, argv: Sequence[str]) -> str:
    """The table of a benchmark that is run here and at a revision.

    Args:
        module: name of the benchmark, such as "bench.cost".
        key: columns of its rows that say what a row is about; ``ms_p50`` is compared.
        ref: any name that git knows.
        argv: options of the benchmark; ``--against`` and ``--out`` among them are dropped.

    Raises:
        SystemExit: git knows no such revision, or the benchmark failed on one side.
    """
    mine, theirs = both(module, ref, _without_ours(argv))
    return table(key, ref, mine, theirs)


def _without_ours(argv: Sequence[str]) -> list[str]:
    ours = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    ours.add_argument("--against")
    ours.add_argument("--out")
    return ours.parse_known_args(argv)[1]


def both(module: str, ref: str, options: list[str], root: Path = ROOT) -> tuple[Rows, Rows]:
    """Rows of the benchmark here and at the revision, measured in turns."""
    with tempfile.TemporaryDirectory() as name, worktree(ref, Path(name) / "tree", root) as other:
        folder, running = Path(name), {}
        try:
            for side, tree in (("here", root), ("there", other)):
                command = [sys.executable, "-m", module, *options, "--out", str(folder / f"{side}.csv")]
                running[side] = _start(command, tree, folder / "turns", folder / f"{side}.txt")
            for side, process in running.items():
                if process.wait():
                    last = (folder / f"{side}.txt").read_text(encoding="utf-8")[-2000:]
                    raise SystemExit(f"{module} failed {'here' if side == 'here' else f'at {ref}'}:\n{last}")
        finally:
            for process in running.values():
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)  # its own session: with the processes it started
                    process.wait()
        return read_rows(folder / "here.csv"), read_rows(folder / "there.csv")


def _start(command: list[str], tree: Path, turns: Path, words: Path) -> subprocess.Popen[bytes]:
    settings = os.environ | {"PYTHONPATH": str(tree), VARIABLE: str(turns)}
    with words.open("wb") as out:
        return subprocess.Popen(
            command, cwd=tree, env=settings, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )


@contextlib.contextmanager
def worktree(ref: str, path: Path, root: Path = ROOT) -> Iterator[Path]:
    """A checkout of the revision at `path`, with the benchmarks of `root`; it is gone afterwards, whatever happened."""
    known = _git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", ref + "^{commit}")
    if known.returncode:
        raise SystemExit(f"--against {ref}: git knows no such revision; name a commit, a branch or a tag")
    added = _git(root, "worktree", "add", "--detach", "--quiet", str(path), known.stdout.strip())
    if added.returncode:
        raise SystemExit(f"--against {ref}: no worktree could be made: {added.stderr.strip()}")
    try:
        shutil.rmtree(path / "bench", ignore_errors=True)
        shutil.copytree(
            root / "bench", path / "bench", ignore=shutil.ignore_patterns("results", "scratch", "__pycache__")
        )
        yield path
    finally:
        _git(root, "worktree", "remove", "--force", str(path))


def _git(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=False)


def table(key: Sequence[str], ref: str, mine: Rows, theirs: Rows) -> str:
    """Median times of both sides and their ratio, this tree over the revision; a case that one side lacks is kept."""
    here, there = ({tuple(row[name] for name in key): row["ms_p50"] for row in rows} for rows in (mine, theirs))
    lines = [f"| {' | '.join(key)} | here, ms | {ref}, ms | here over {ref} |", "|" + "---|" * (len(key) + 3)]
    for case in dict.fromkeys([*here, *there]):
        ours, other = here.get(case), there.get(case)
        ratio = f"{float(ours) / float(other):.3f}" if ours and other else "failed on one side"
        lines.append(f"| {' | '.join(case)} | {ours or '-'} | {other or '-'} | {ratio} |")
    return "\n".join(lines) + "\n"
