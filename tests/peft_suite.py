"""PEFT's own tests, with every model that PEFT makes passed through `apt.patch_model`, beside a run without.

Not part of CI: it takes the better part of an hour and needs a checkout of PEFT in the pinned version, or its sdist. It
downloads nothing; tests that need the hub fail or skip alike in both runs. PEFT's tests import datasets, diffusers and
parameterized.

    python tests/peft_suite.py CHECKOUT                        # test_custom_models.py and the model tests
    python tests/peft_suite.py CHECKOUT test_custom_models.py -k lora

It prints how many tests pass and fail in each run, and which fail only with the patch; then its exit code is 1.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FILES = (
    "test_custom_models.py",
    "test_decoder_models.py",
    "test_encoder_decoder_models.py",
    "test_feature_extraction_models.py",
    "test_seq_classifier.py",
)
PATCH, REPORT = "APT_PEFT_SUITE_PATCH", "APT_PEFT_SUITE_REPORT"  # what the plugin below is told
# Why a model stays as it is.
LEFT = ("none of PEFT's layers can be fused", "of PEFT's methods only LoRA", "is patched already")


def pytest_configure() -> None:
    """As a plugin of pytest: have every model patched, before the tests import the functions that make one."""
    if os.environ.get(PATCH) != "1":
        return
    import peft

    import apt

    def patching(make: Any) -> Any:
        def made(*args: Any, **kwargs: Any) -> Any:
            model = make(*args, **kwargs)
            try:
                apt.patch_model(model)
            except ValueError as error:
                if not any(words in str(error) for words in LEFT):
                    raise
            return model

        return made

    peft.get_peft_model = patching(peft.get_peft_model)
    peft.PeftModel.from_pretrained = staticmethod(patching(peft.PeftModel.from_pretrained))  # type: ignore[method-assign]


def pytest_runtest_logreport(report: Any) -> None:
    """As a plugin of pytest: one line for each test that ran, or that its fixtures kept from running."""
    if report.when == "call" or report.outcome != "passed":
        with Path(os.environ[REPORT]).open("a", encoding="utf-8") as file:
            file.write(json.dumps([report.nodeid, report.outcome]) + "\n")


def outcomes(checkout: Path, arguments: list[str], *, patch: bool) -> dict[str, str]:
    """Run the tests, and return what became of each.

    Args:
        checkout: of PEFT.
        arguments: of pytest, file names in ``tests/`` first.
        patch: whether models are patched.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.jsonl"
        report.touch()
        paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
        environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", REPORT: str(report)}
        environment[PATCH] = "1" if patch else "0"
        # Without the options of the checkout, which measures its coverage.
        options = ["-q", "-o", "addopts=", "-p", "peft_suite", "-p", "no:cacheprovider"]
        command = [sys.executable, "-m", "pytest", *options, *arguments]
        run = subprocess.run(command, cwd=checkout / "tests", env=environment, check=False)
        if run.returncode not in (0, 1):
            raise SystemExit(f"peft_suite: pytest ended with {run.returncode}")
        rows = [json.loads(line) for line in report.read_text(encoding="utf-8").splitlines()]
    return dict(rows)


def main(checkout: Path, arguments: list[str]) -> int:
    """Run both and compare; returns how many tests fail only with the patch."""
    import peft

    about = next((checkout / path for path in ("src/peft/__init__.py",) if (checkout / path).exists()), None)
    found = re.search(r'__version__ = "(.+?)"', about.read_text(encoding="utf-8")) if about is not None else None
    if found is None or found[1] != peft.__version__:
        there = "no PEFT" if found is None else f"PEFT {found[1]}"
        raise SystemExit(f"peft_suite: {checkout} holds {there}; check out the installed version, v{peft.__version__}")
    if not any(argument.endswith(".py") or ".py::" in argument for argument in arguments):
        arguments = [*FILES, *arguments]
    plain = outcomes(checkout, arguments, patch=False)
    patched = outcomes(checkout, arguments, patch=True)
    for title, run in (("unpatched", plain), ("patched", patched)):
        counts = Counter(run.values())
        print(f"{title:<10} {', '.join(f'{count} {outcome}' for outcome, count in sorted(counts.items()))}")
    broken = [name for name, outcome in patched.items() if outcome == "failed" and plain.get(name) != "failed"]
    print(f"fail only with the patch: {len(broken)}", *broken, sep="\n  ")
    return min(len(broken), 1)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    sys.exit(main(Path(sys.argv[1]).expanduser(), sys.argv[2:]))
