"""Timing against a git revision: on a tiny repository whose library got slower, and when one side fails."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench import against
from bench.turns import VARIABLE

TOY = """
import sys, time, apt, torch
from pathlib import Path
from bench.rows import append_row
from bench.timing import Clock
calls = {"sleep": [lambda: time.sleep(apt.SECONDS)]}
for case in sys.argv[1 : sys.argv.index("--out")]:
    times = Clock(torch.device("cpu"), runs=5).interleaved(calls)["sleep"]
    append_row(Path(sys.argv[-1]), {"case": case, "ms_p50": times.median})
"""


def git(root: Path, *words: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *who, *words], cwd=root, check=True, capture_output=True, text=True).stdout


def library(root: Path, text: str) -> None:
    (root / "apt" / "__init__.py").write_text(text, encoding="utf-8")
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", text)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Three commits: a slow library, a broken one, and a fast one in the tree."""
    root = tmp_path / "repository"
    for folder in ("apt", "bench"):
        (root / folder).mkdir(parents=True)
    git(root, "init", "-q")
    shutil.copytree(against.ROOT / "apt" / "files", root / "apt" / "files")  # what the benchmarks write rows with
    library(root, "SECONDS = 0.06")
    git(root, "tag", "slow")
    library(root, "raise RuntimeError('a planted fault')")
    git(root, "tag", "broken")
    library(root, "SECONDS = 0.02")
    for name in ("__init__", "rows", "timing", "turns"):
        shutil.copy(against.ROOT / "bench" / f"{name}.py", root / "bench")
    (root / "bench" / "toy.py").write_text(TOY, encoding="utf-8")  # not in git: the benchmark of this tree is used
    return root


def trees(root: Path) -> int:
    return len(git(root, "worktree", "list").splitlines())


def test_a_slower_revision_is_seen(repository: Path) -> None:
    mine, theirs = against.both("bench.toy", "slow", ["one", "two"], repository)
    text = against.table(("case",), "slow", mine, theirs)
    ratios = {line.split(" | ")[0]: float(line.split(" | ")[3].rstrip(" |")) for line in text.splitlines()[2:]}
    assert ratios == {"| one": pytest.approx(1 / 3, rel=0.25), "| two": pytest.approx(1 / 3, rel=0.25)}
    assert trees(repository) == 1


def test_a_revision_that_fails_is_reported_and_its_tree_removed(repository: Path) -> None:
    with pytest.raises(SystemExit, match=r"failed at broken:(.|\n)*a planted fault"):
        against.both("bench.toy", "broken", ["one"], repository)
    assert trees(repository) == 1


def test_a_failure_inside_removes_the_tree(repository: Path, tmp_path: Path) -> None:
    def fails() -> None:
        with against.worktree("slow", tmp_path / "tree", repository) as tree:
            assert (tree / "apt" / "__init__.py").read_text(encoding="utf-8") == "SECONDS = 0.06"
            assert trees(repository) == 2
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert trees(repository) == 1
    assert not (tmp_path / "tree").exists()


def test_an_unknown_revision_is_refused(repository: Path) -> None:
    with pytest.raises(SystemExit, match="git knows no such revision"):
        against.both("bench.toy", "v99", ["one"], repository)


def test_a_case_of_one_side_is_kept() -> None:
    row = {"case": "old", "ms_p50": "2.0"}
    lines = against.table(("case",), "v1", [{"case": "new", "ms_p50": "3.0"}], [row]).splitlines()
    assert lines[2:] == ["| new | 3.0 | - | failed on one side |", "| old | - | 2.0 | failed on one side |"]


def test_processes_alternate(tmp_path: Path) -> None:
    """Each writes its name three times: in turns, whichever begins."""
    text = "import sys, time, pathlib; from bench.turns import TURNS\n"
    text += "here = pathlib.Path(sys.argv[1]); TURNS.give(); here.with_name(sys.argv[2]).touch()\n"
    text += "while not all(here.with_name(name).exists() for name in 'ab'): time.sleep(0.001)\n"
    text += "for _ in range(3):\n  TURNS.change(); here.open('a').write(sys.argv[2]); time.sleep(0.05)\n"
    settings = os.environ | {VARIABLE: str(tmp_path / "lock"), "PYTHONPATH": str(against.ROOT)}
    command = [sys.executable, "-c", text, str(tmp_path / "order")]
    both = [subprocess.Popen([*command, name], env=settings) for name in "ab"]
    assert [process.wait() for process in both] == [0, 0]
    order = (tmp_path / "order").read_text(encoding="utf-8")
    assert sorted(order) == list("aaabbb")
    assert "ababa" in order or "babab" in order


def test_the_options_of_the_comparison_are_not_passed_on() -> None:
    argv = ["--shapes", "a", "b", "--against", "main", "--runs", "3", "--out=x.csv"]
    assert against._without_ours(argv) == ["--shapes", "a", "b", "--runs", "3"]
