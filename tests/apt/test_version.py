"""What a result was made with is what is installed, and the commit of a checkout."""

import subprocess
from pathlib import Path

import torch
import transformers

from apt import __version__
from apt.version import source_commit, versions_used


def git(tree: Path, *words: str) -> str:
    who = ["-c", "user.name=t", "-c", "user.email=t@example.invalid"]
    return subprocess.run(["git", "-C", str(tree), *who, *words], capture_output=True, text=True, check=True).stdout


def test_versions_are_those_of_the_packages() -> None:
    found = versions_used("numpy")
    assert (found["apt-lm"], found["torch"], found["transformers"]) == (
        __version__,
        str(torch.__version__),
        transformers.__version__,
    )
    assert "numpy" in found


def test_the_commit_of_a_checkout_and_whether_it_was_changed(tmp_path: Path) -> None:
    assert source_commit(tmp_path) is None
    git(tmp_path, "init", "-q")
    (tmp_path / "file").write_text("one")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-qm", "first")
    git(tmp_path, "tag", "v1")
    commit = git(tmp_path, "rev-parse", "--short", "HEAD").strip()
    assert source_commit(tmp_path) == commit
    (tmp_path / "file").write_text("two")
    assert source_commit(tmp_path) == f"{commit}-dirty"
