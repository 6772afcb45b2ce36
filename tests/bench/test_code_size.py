"""The size of code, counted by hand on a repository of a few files."""

import subprocess
from pathlib import Path

import pytest

from bench import code_size

SMALL = '"""A module."""\n\nX = 1\n'
GROWN = '''"""A module, in more words."""

import os


class Room:
    """A class."""

    async def enter(self):
        """Return a module."""
        return os
'''


def git(root: Path, *words: str) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *who, *words], cwd=root, check=True, capture_output=True)


def write(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text, encoding="utf-8")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A small module in a commit; in the tree it has grown, and there is a test that git does not know yet."""
    git(tmp_path, "init", "-q")
    write(tmp_path, ".gitignore", "ignored.py\n")
    write(tmp_path, "apt/room/one.py", SMALL)
    write(tmp_path, "apt/room/empty.py", "")
    write(tmp_path, "apt/gone.py", "")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-q", "-m", "small")
    (tmp_path / "apt/gone.py").unlink()
    write(tmp_path, "apt/room/one.py", GROWN)
    write(tmp_path, "apt/ignored.py", GROWN)
    write(tmp_path, "tests/test_it.py", "def test_it():\n" + "    pass\n" * 50 + "def tester(): pass\n")
    return tmp_path


def test_the_tree_and_a_revision_beside_it(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code_size.main(["HEAD"], repository)
    header, _, *lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    rows = {(line[0], line[1]): dict(zip(header[2:], line[2:], strict=True)) for line in lines}
    counts = {"functions": "0", "over 50": "0", "over 60": "0", "tests": "0"}
    # Module, Assign, Name, Store, Constant; an empty module is one node
    assert rows["apt", "HEAD"] == counts | {"nodes": "7", "statements": "1", "lines": "3", "names": "2"}
    # Module, Import, alias, ClassDef, AsyncFunctionDef, arguments, arg, Return, Name, Load
    counts["functions"] = "1"
    assert rows["apt", "here"] == counts | {"nodes": "11", "statements": "4", "lines": "11", "names": "1"}
    assert rows["tests", "here"]["tests"] == "1"
    assert (rows["tests", "here"]["functions"], rows["tests", "here"]["over 50"]) == ("2", "1")
    assert rows["tests", "here"]["over 60"] == rows["tests", "HEAD"]["lines"] == "0"
