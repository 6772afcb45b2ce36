"""PEFT's own tests, with every model that PEFT makes passed through `apt.patch_model`; then those that fail, without.

Not part of CI: it takes the better part of an hour, and needs a checkout of PEFT in the pinned version, or its sdist
unpacked. It downloads nothing: the models that the tests ask the hub for are made here, random and tiny
(`peft_models.py`). PEFT's tests import datasets, diffusers and parameterized. The checkout stays as it is.

    python tests/peft_suite.py CHECKOUT                        # test_custom_models.py and the model tests
    python tests/peft_suite.py CHECKOUT test_custom_models.py -k lora
    python tests/peft_suite.py CHECKOUT --both                 # without the patch every test, which finds nothing more
    python tests/peft_suite.py CHECKOUT --reports FOLDER       # keeps what became of each test; goes on where it ended

It prints for each file how many tests pass, are skipped and fail in each run, how many ran on our op, and which pass
only without the patch; then its exit code is 1.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from peft_models import write_hub

ROOT = Path(__file__).parents[1]
FILES = (
    "test_custom_models.py",
    "test_decoder_models.py",
    "test_encoder_decoder_models.py",
    "test_feature_extraction_models.py",
    "test_seq_classifier.py",
    "test_token_classification_qa.py",
)
# What the plugin is told: 1 to patch every model; the file for one line a test; one whose passed tests are left out.
PATCH, REPORT, OTHER = "APT_PEFT_SUITE_PATCH", "APT_PEFT_SUITE_REPORT", "APT_PEFT_SUITE_OTHER"


def check_version(checkout: Path) -> None:
    """Refuse a checkout of another version than the installed one, whose tests would test something else."""
    import peft

    about = checkout / "src" / "peft" / "__init__.py"
    found = re.search(r'__version__ = "(.+?)"', about.read_text(encoding="utf-8")) if about.exists() else None
    if found is None or found[1] != peft.__version__:
        there = "no PEFT" if found is None else f"PEFT {found[1]}"
        raise SystemExit(f"peft_suite: {checkout} holds {there}; check out the installed version, v{peft.__version__}")


def copy_tests(checkout: Path, folder: Path) -> None:
    """Put PEFT's tests, a package also where they come from an sdist, and the hub's cache into a folder of ours."""
    shutil.copytree(checkout / "tests", folder / "tests")
    (folder / "tests" / "__init__.py").touch()
    write_hub(folder / "hub")


def rows(report: Path) -> list[list[Any]]:
    """The lines of a report: the test, what became of it, how often our op ran, why it failed."""
    return [json.loads(line) for line in report.read_text(encoding="utf-8").splitlines()] if report.exists() else []


def run_tests(folder: Path, arguments: list[str], *, report: Path, patch: bool, other: Path | None = None) -> None:
    """Run the tests that the report does not have yet.

    Args:
        folder: of `copy_tests`.
        arguments: of pytest, file names in ``tests/`` first.
        report: where each test gets its line.
        patch: whether models are patched.
        other: the report of another run; what passed there is left out.
    """
    paths = os.pathsep.join(map(str, (folder, ROOT, ROOT / "tests")))
    hub = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HUB_CACHE": str(folder / "hub")}
    told = {PATCH: str(int(patch)), REPORT: str(report), OTHER: str(other or "")}
    environment = {**os.environ, **hub, **told, "PYTHONPATH": paths}
    options = ["-q", "--disable-warnings", "-p", "peft_plugin", "-p", "no:cacheprovider", "--rootdir", str(folder)]
    command = [sys.executable, "-m", "pytest", *options, *arguments]
    run = subprocess.run(command, cwd=folder / "tests", env=environment, check=False)
    if run.returncode not in (0, 1, 5):  # 5: no test is left to run
        raise SystemExit(f"peft_suite: pytest ended with {run.returncode}")


def print_counts(title: str, run: dict[str, list[Any]]) -> None:
    """One line for each file: how many tests passed, and so on; how many of them went through our op."""
    print(title)
    for file in sorted({name.split("::")[0] for name in run}):
        mine = [row for name, row in run.items() if name.split("::")[0] == file]
        counts = Counter(outcome for _, outcome, _, _ in mine)
        said = ", ".join(f"{counts[outcome]} {outcome}" for outcome in ("passed", "skipped", "failed"))
        print(f"  {Path(file).name:<34} {said}; {sum(row[2] > 0 for row in mine)} on the fused op")


def main(checkout: Path, reports: Path, arguments: list[str], *, both: bool) -> int:
    """Run both and compare; returns 1 where a test passes only without the patch.

    Args:
        checkout: of PEFT.
        reports: the folder for ``patched.jsonl`` and ``unpatched.jsonl``.
        arguments: of pytest.
        both: whether what passes patched runs without the patch too.
    """
    check_version(checkout)
    if not any(argument.endswith(".py") or ".py::" in argument for argument in arguments):
        arguments = [*FILES, *arguments]
    with_patch, without = reports / "patched.jsonl", reports / "unpatched.jsonl"
    with tempfile.TemporaryDirectory() as folder:
        copy_tests(checkout, Path(folder))
        run_tests(Path(folder), arguments, report=with_patch, patch=True)
        run_tests(Path(folder), arguments, report=without, patch=False, other=None if both else with_patch)
    patched, plain = ({row[0]: row for row in rows(report)} for report in (with_patch, without))
    print_counts("patched", patched)
    print_counts("without the patch" if both else "without the patch, what did not pass with it", plain)
    passed = [name for name, row in plain.items() if row[1] == "passed"]
    # A test without a line ended the process; a skip may hide a fault.
    broken = [patched.get(name, [name, "missing", 0, ""]) for name in passed]
    broken = [row for row in broken if row[1] != "passed"]
    print(f"pass only without the patch: {len(broken)}")
    for name, outcome, _, why in broken:
        print(f"  {name} {outcome} {why}")
    return min(len(broken), 1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="of PEFT, in the installed version")
    parser.add_argument("--reports", type=Path, help="a folder for patched.jsonl and unpatched.jsonl")
    parser.add_argument("--both", action="store_true", help="run without the patch what passes with it, too")
    given, rest = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as temporary:
        where = Path(temporary) if given.reports is None else given.reports.expanduser().resolve()
        where.mkdir(parents=True, exist_ok=True)
        sys.exit(main(given.checkout.expanduser().resolve(), where, rest, both=given.both))
