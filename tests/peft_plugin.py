"""A plugin of pytest for PEFT's own tests: patches what they make, and writes down what becomes of each test.

`peft_suite.py` runs it, and tells it by variables of the environment what to patch and where to write.
"""

import importlib
import json
import os
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from peft_models import quotes
from peft_suite import OTHER, PATCH, REPORT, rows

import apt_kernels

# Why a model stays as it is.
LEFT = ("none of PEFT's layers can be fused", "of PEFT's methods only LoRA", "is patched already")


def pytest_configure() -> None:
    """Before the tests import what they use: keep them from the hub, and patch the functions that make models."""
    utils: Any = importlib.import_module("tests.testing_utils")
    utils._HUB_MODEL_ACCESSES = Known(int)
    utils.load_dataset_english_quotes = quotes
    if os.environ[PATCH] == "1":
        import peft

        for name in ("get_peft_model", "inject_adapter_in_model"):
            setattr(peft, name, patching(getattr(peft, name)))
        kind: Any
        for kind in (peft.PeftModel, peft.PeftMixedModel):
            kind.from_pretrained = classmethod(patching(kind.from_pretrained.__func__))


class Known(defaultdict[str, int]):
    """The names that PEFT's tests have asked the hub for, which they do not ask for again: all."""

    def __contains__(self, name: object) -> bool:
        return True


def patching(make: Any) -> Any:
    """A function that makes a model, with `apt.patch_model` behind it."""
    import apt

    def made(*args: Any, **kwargs: Any) -> Any:
        model = make(*args, **kwargs)
        with warnings.catch_warnings():
            # One of the tests asks for the last warning of `get_peft_model`, which this is not.
            warnings.filterwarnings("ignore", message="apt: on PEFT's own path stay")
            try:
                apt.patch_model(model)
            except ValueError as error:
                if not any(words in str(error) for words in LEFT):
                    raise
        return model

    return made


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what the report has already, and what passed in the other run."""
    have = {row[0] for row in rows(Path(os.environ[REPORT]))}
    if os.environ[OTHER]:
        have |= {row[0] for row in rows(Path(os.environ[OTHER])) if row[1] == "passed"}
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in have])
    items[:] = [item for item in items if item.nodeid not in have]


def pytest_runtest_setup() -> None:
    """Count the calls of our op anew."""
    apt_kernels.reset_calls()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """One line for each test that ran, or that its fixtures kept from running, or that failed in what comes after."""
    if report.when == "call" or report.outcome != "passed":
        calls = sum(apt_kernels.calls().get("masked_lora_linear", {}).values())
        crash = getattr(report.longrepr, "reprcrash", None)
        row = [report.nodeid, report.outcome, calls, "" if crash is None else crash.message.split("\n")[0]]
        with Path(os.environ[REPORT]).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
